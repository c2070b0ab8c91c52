"""Tables of what is counted or timed and not trained: sizes, memory and multiply-adds, benchmarks, leaks, splits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lab import paths
from lab.bench import cases, runner
from lab.claims import exact
from lab.claims.ledger import ledger, part_hash
from lab.claims.statistics import prints_as
from lab.cost import count
from lab.data.cards import source
from lab.experiments.catalogue import stem_model
from lab.experiments.profiles import Arm, Profile
from lab.experiments.small import STEM_ARMS
from lab.paper import paper_numbers, paper_table
from lab.report import paper
from lab.report.tables import NOT_RUN, framed
from vitlib.model import ViT, ViTConfig, fuse, vit_config

MB = 2**20

# ---------------------------------------------------------------------------------------------------- sizes

FORM = {name: f"{{{name}}}" for name in ("width", "layers", "branches", "pairs")} | {"params": "{params:,}"}
MILLIONS = {"params_m": "{params_m:.1f}", "gmacs": "{gmacs:.2f}", "paper": "{printed_params} M, {printed_gflops} G"}


def _size(config: ViTConfig) -> dict[str, float]:
    size = exact.size(config)
    form = {"width": config.width, "layers": config.depth, "branches": config.branches, "pairs": config.pairs}
    return form | {"params": size.params, "params_m": size.params / 1e6, "macs": size.macs, "gmacs": size.macs / 1e9}


def _models(rows: Sequence[Mapping[str, str]]) -> dict[str, ViTConfig]:
    scale = {row["model"]: 1e-4 if row.get("layer_scale") == "yes" else None for row in rows}
    return {name: vit_config(name, layer_scale=value) for name, value in scale.items()}


def figure_models(name: str) -> dict[str, ViTConfig]:
    """The models of Figure 2 or 3, at the paper's sizes."""
    return _models(paper_table(name).to_dict("records"))


def table3_models(*more: str) -> dict[str, ViTConfig]:
    """The models of Table 3, with and without LayerScale as there, and others (with it) by name."""
    others = [{"model": name, "layer_scale": "yes"} for name in more]
    return _models(paper_table("table3").to_dict("records") + others)


def sizes(models: Mapping[str, ViTConfig]) -> pd.DataFrame:
    """Parameters and multiply-adds of each model, counted; the paper's printed values beside, where it has them."""
    paper = paper_table("table3").set_index("model")
    rows = [{"model": name} | _size(config) | _printed(paper, name) for name, config in models.items()]
    return framed(rows, {"model": "{model}"} | FORM | MILLIONS)


def _printed(table: pd.DataFrame, name: str) -> dict[str, str]:
    columns = {"printed_params": "params_m", "printed_gflops": "gflops"}
    return {ours: table.loc[name, theirs] for ours, theirs in columns.items()} if name in table.index else {}


def table1_sizes() -> pd.DataFrame:
    """The models of Table 1 with LayerScale and without: counted, and whether that prints as the paper prints it."""
    rows = []
    for row in paper_table("table1").itertuples():
        size = _size(vit_config(row.model, layer_scale=1e-4 if row.layer_scale == "yes" else None))
        same = prints_as(size["params_m"], row.params_m) and prints_as(size["gmacs"], row.gflops)
        printed = {"printed_params": row.params_m, "printed_gflops": row.gflops, "same": "yes" if same else "no"}
        rows.append({"model": row.printed_name, "scale": row.layer_scale} | size | printed)
    layout = {"model": "{model}", "LayerScale": "{scale}", "params": "{params:,}"} | MILLIONS
    return framed(rows, layout | {"to the printed digit": "{same}"})


def arm_sizes(arms: Mapping[str, Arm]) -> pd.DataFrame:
    """The models that a notebook trains, counted."""
    rows = [{"arm": label} | _size(arm.spec.model) for label, arm in arms.items()]
    return framed(rows, {"arm": "{arm}"} | FORM | {"multiply-adds": "{macs:,}"})


def fused_sizes() -> pd.DataFrame:
    """What `fuse` makes of the models of Table 4: the same multiply-adds in half the layers."""
    rows = []
    for name in ("S18x2", "B18x2"):
        with torch.device("meta"):
            model = ViT(vit_config(name, layer_scale=1e-4)).eval()
            for one in (model, fuse(model)):
                config = one.config
                rows.append({
                    "model": config.name, "layers": config.depth, "branches": config.branches, "heads": config.heads,
                    "ffn": config.ffn_width or 4 * config.width, "params": count.params(one), "macs": count.macs(one).matmul / 1e9,
                })  # fmt: skip
    layout = {name: f"{{{name}}}" for name in ("model", "layers", "branches", "heads")}
    return framed(rows, layout | {"FFN width": "{ffn}", "params": "{params:,}", "gmacs_matmul": "{macs:.3f}"})


def stem_sizes(p: Profile | None = None) -> pd.DataFrame:
    """The rows of Table 7 at ViT-B's size, counted, and as printed; with a profile, the share at its size too."""
    rows, base = [], exact.size(paper.stem_config("linear")).macs
    for name in STEM_ARMS:
        config, printed = paper.stem_config(name), paper.stem_row(name)
        row = {"stem": name, "model": f"B{config.depth}", "norm": config.norm, "act": config.act} | _size(config)
        row["more"] = 100 * (row["macs"] / base - 1)
        if printed is not None:
            same = prints_as(row["gmacs"], printed["gflops"])
            row |= {"printed": printed["gflops"], "same": "as printed" if same else None}
            row["apart"] = np.nan if same else 100 * (row["gmacs"] / float(printed["gflops"]) - 1)
        if p is not None:
            small, linear = (exact.size(stem_model(p, stem)).macs for stem in (name, "linear"))
            row["more here"] = 100 * (small / linear - 1)
        rows.append(row)
    layout: dict[str, str | tuple[str, ...]] = {name: f"{{{name}}}" for name in ("stem", "model", "norm", "act")}
    layout |= {"params": "{params:,}", "gmacs": "{gmacs:.3f}", "paper, GFLOPs": "{printed}"}
    layout |= {"ours minus paper": ("{apart:+.2f} %", "{same}"), "more than linear": "{more:+.2f} %"}
    more = {f"more than linear, {stem_model(p, 'linear').name}": "{more here:+.2f} %"} if p is not None else {}
    return framed(rows, layout | more)


# ---------------------------------------------------------------------------------------------------- fine-tuning


def trained_shares() -> pd.DataFrame:
    """Figure 4 and section 4: what each strategy trains of ViT-B at 384, and the memory in MB that it keeps, counted."""
    rows = []
    for strategy in ("full", "attn", "ffn", "head"):
        kept = exact.memory(strategy)
        rows.append({
            "strategy": strategy, "trained": kept.gradients // 4, "share": 100 * kept.gradients / kept.weights,
            "weights": kept.weights / MB, "state": (kept.gradients + kept.optimizer) / MB,
            "activations": kept.activations / MB, "all": kept.total / MB,
        })  # fmt: skip
    layout = {"strategy": "{strategy}", "trained_params": "{trained:,}", "share of all": "{share:.1f} %"}
    headers = {"weights": "weights, MB", "state": "gradients + AdamW state, MB",
               "activations": "saved activations, MB an image", "all": "all, batch of 1, MB"}  # fmt: skip
    for column in headers:
        _less(rows, column, rows[0][column])
    return framed(rows, layout | {header: _megabytes(column, 1) for column, header in headers.items()})


def _less(rows: Sequence[dict], column: str, full: float) -> None:
    """Adds by how many percent a column of bytes is less than `full`, where it is."""
    for row in rows:
        row[f"{column} less"] = 100 * (1 - row[column] / full) if row[column] != full else np.nan


def _megabytes(column: str, digits: int = 0) -> tuple[str, str]:
    """ "226.9 (38.8 % less)", or the number alone."""
    number = f"{{{column}:,.{digits}f}}"
    return f"{number} ({{{column} less:.1f}} % less)", number


# ViT-B's memory is looked at for these: image size, attention, precision
SETTINGS = list(itertools.product((224, 384), ("explicit", "fused"), ("float32", "amp")))
NAMES = ("image_size", "attention", "precision")


def memory_savings(batch: int = 32) -> pd.DataFrame:
    """What attention-only saves of a step's memory in MB, in all and of activations, by resolution, kernel and precision.

    Every token is computed in every layer, as in the released code; the last rows are a stack of today.
    """
    rows = []
    for *setting, skip in [(*s, False) for s in SETTINGS] + [(size, "fused", "amp", True) for size in (224, 384)]:
        full, attn = (exact.memory(s, *setting, batch, skip) for s in ("full", "attn"))
        row = dict(zip(NAMES, setting, strict=True)) | {"layer": "what is read" if skip else "all tokens"}
        row |= {"full": full.total / MB, "full activations": full.activations / MB}
        row |= {"attn": attn.total / MB, "attn activations": attn.activations / MB}
        for what in ("", " activations"):
            _less([row], f"attn{what}", row[f"full{what}"])
        rows.append(row)
    layout = {name: f"{{{name}}}" for name in NAMES} | {"last layer": "{layer}"}
    return framed(rows, layout | {
        f"full, batch of {batch}, MB": "{full:,.0f}", "attn, MB": _megabytes("attn"),
        "activations, full, MB": "{full activations:,.0f}", "activations, attn, MB": _megabytes("attn activations"),
    })  # fmt: skip


def figure4_memory() -> pd.DataFrame:
    """Figure 4's two peaks against what is counted, in MB, by resolution, kernel and precision.

    First the batch at which `full` alone explains its peak, and what attention-only would then need. Then the batch
    that explains the difference of both peaks, from which everything drops out that both need alike, counted or not:
    what is left of full's peak is then not counted. Last the saving that no batch falls below.
    """
    peak, peak_attn = paper_numbers("figure4").set_index("panel").loc["peak memory", ["full", "attn"]].astype(float)
    rows = []
    for setting in SETTINGS:
        (fixed, each), (fixed_attn, each_attn) = (memory_line(s, *setting) for s in ("full", "attn"))
        batch = (peak - fixed) / each
        apart = (peak - peak_attn - fixed + fixed_attn) / (each - each_attn)
        row = {"batch": batch, "attn": fixed_attn + batch * each_attn, "batch apart": apart}
        row |= {
            "counted": fixed + apart * each,
            "rest": peak - fixed - apart * each,
            "least": 100 * (1 - each_attn / each),
        }
        _less([row], "attn", peak)
        rows.append(dict(zip(NAMES, setting, strict=True)) | row)
    return framed(rows, {name: f"{{{name}}}" for name in NAMES} | {
        f"full = {peak:,.0f} MB at batch": "{batch:.1f}", f"attn there, MB (paper: {peak_attn:,.0f})": _megabytes("attn"),
        f"full - attn = {peak - peak_attn:,.0f} MB at batch": "{batch apart:.1f}",
        "full counted there, MB": "{counted:,.0f}", "not counted, MB": "{rest:,.0f}", "never less than": "{least:.1f} %",
    })  # fmt: skip


def memory_line(strategy: str, image_size: int, attention: str, precision: str) -> tuple[float, float]:
    """A step's memory, all tokens computed, in MB: the fixed part and the part per image (exactly a line from 2 on)."""
    some, more = (exact.memory(strategy, image_size, attention, precision, n, False).total / MB for n in (32, 33))
    return some - 32 * (more - some), more - some


def step_multiply_adds() -> pd.DataFrame:
    """10^9 multiply-adds of a training step of ViT-B by kind of layer, forward and backward, full and attention-only."""
    rows = []
    for size in (224, 384):
        full, attn = (pd.DataFrame(exact.step_macs(s, size), index=count.Step._fields) / 1e9 for s in ("full", "attn"))
        full["all"], attn["all"] = full.sum(axis=1), attn.sum(axis=1)
        for kind in full.columns.drop("other"):
            before, after = full[kind].sum(), attn[kind].sum()
            rows.append({
                "image_size": size, "kind": kind, "forward": full.loc["forward", kind],
                "backward full": full.loc["backward", kind], "backward attn": attn.loc["backward", kind],
                "full": before, "attn": after, "spared": 100 * (before - after) / full["all"].sum(),
            })  # fmt: skip
    return framed(rows, {
        "image_size": "{image_size}", "kind": "{kind}", "forward, gmacs_matmul": "{forward:.3f}",
        "backward, full": "{backward full:.3f}", "backward, attn": "{backward attn:.3f}",
        "step, full": "{full:.3f}", "step, attn": "{attn:.3f}", "spared, % of the step": "{spared:.3f}",
    })  # fmt: skip


def step_costs(p: Profile) -> pd.DataFrame:
    """A training step at the profile's own size: time from five process restarts, memory counted; nothing at smoke."""
    if not p.judged:
        return framed([{"strategy": s, "step": "no timing at smoke"} for s in ("full", "attn", "ffn", "head")],
                      {"strategy": "{strategy}", "step": "{step}"})  # fmt: skip
    part = ledger()[cases.F3]
    table = pd.DataFrame(cases.measured_evidence(p, part, part_hash(part.entry(p.name))))
    full, rows = table[table["arm"] == "full"], []
    for strategy, group in table.groupby("arm", sort=False):
        ratio = full["time_s"].to_numpy() / group["time_s"].to_numpy()
        memory = group["mem_mb"].iloc[0]
        rows.append({
            "strategy": strategy, "step": group["case"].iloc[0], "time": group["time_s"].median(), "ratio": ratio.mean(),
            "sd": ratio.std(ddof=1), "n": len(ratio), "memory": memory, "memory ratio": full["mem_mb"].iloc[0] / memory,
        })  # fmt: skip
    return framed(rows, {
        "strategy": "{strategy}", "step": "{step}", "time_s": "{time:.4f}",
        "full over this, time_s": "{ratio:.3f} ± {sd:.3f} (n={n})", "mem_mb, counted": "{memory:.1f}",
        "full over this, mem_mb": "{memory ratio:.3f}",
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------- Tables 3, 4 and 9


def form_memory() -> pd.DataFrame:
    """Table 3's memory in MB: more pairs over the width of like cost, a training step and a forward pass, counted."""
    printed, rows = paper_numbers("table3").set_index("model")["peak_mem_mb"], []
    for more, wide in exact.MORE_PAIRS.items():
        row = {"models": f"{more} / {wide}", "paper a": printed[more], "paper b": printed[wide]}
        for batch in (1, 32):
            row |= {f"{batch} {x}": exact.training_memory(m, batch).total / MB for x, m in (("a", more), ("b", wide))}
        rows.append(row | {f"{at} ratio": row[f"{at} a"] / row[f"{at} b"] for at in ("paper", 1, 32)})
    layout = {
        "more pairs / more width": "{models}",
        "paper, MB": "{paper a:.0f} / {paper b:.0f}",
        "paper, ratio": "{paper ratio:.2f}",
    }
    for batch in (1, 32):
        layout[f"training step, batch of {batch}, MB"] = f"{{{batch} a:,.0f}} / {{{batch} b:,.0f}}"
        layout[f"ratio at {batch}"] = f"{{{batch} ratio:.2f}}"
    return framed(rows, layout)


def inference_memory(batch: int = 256) -> pd.DataFrame:
    """Table 3's models, a forward pass at its peak in float32, counted, in MB, by kernel of attention; the paper's beside."""
    rows = []
    for row in paper_numbers("table3").itertuples():
        counts = {a: exact.inference_memory(row.model, batch, a) for a in ("explicit", "fused")}
        rows.append({
            "model": row.model, "paper": row.peak_mem_mb, "weights": counts["fused"].weights / MB,
            "images": counts["fused"].images / MB, **{a: held.total / MB for a, held in counts.items()},
        })  # fmt: skip
    return framed(rows, {
        "model": "{model}", "paper, MB": "{paper}", "weights, MB": "{weights:,.0f}", f"{batch} images, MB": "{images:,.0f}",
        **{f"all, {a} attention, MB": f"{{{a}:,.0f}}" for a in ("explicit", "fused")},
    })  # fmt: skip


def benchmark(name: str, p: Profile) -> pd.DataFrame:
    """A benchmark's table: this machine's where it was run here, else the committed one; which of them is a column.

    Medians over process restarts; the ratio to the reference arm with its range over them.
    """
    source, stored = next(((s, rows) for s, rows in bench_rows(name, p) if rows), ("", []))
    if not stored:
        row = {"benchmark": name, "measured": f"{NOT_RUN}: python -m lab bench {name}"}
        return framed([row], {column: f"{{{column}}}" for column in row})
    table = runner.summary(stored).assign(measured=source)
    table[["of_matmul", "of_copy"]] *= 100
    layout = {header: f"{{{header}}}" for header in ("measured", "case", "arm")}
    layout |= {"time_s": "{time_s:.4g}", "ratio": "{ratio:.3g}", "over": "{over}"}
    layout |= {"range (n restarts)": "{low:.3g} to {high:.3g} (n={n})", "over timm": "{over_timm:.3g}"}
    layout |= {"gmacs": "{gmacs:.3g}", "gbytes": "{gbytes:.3g}"}
    layout |= {f"of {top} ceiling": f"{{of_{top}:.0f}} %" for top in ("matmul", "copy")}
    return framed(table, layout | {column: f"{{{column}:.4g}}" for column in runner.MORE}, always=())


def bench_rows(name: str, p: Profile) -> list[tuple[str, list[dict]]]:
    """Where a benchmark was measured, and its rows: here, and the committed ones."""
    committed = paths.REFERENCE / "cpu" / "bench" / f"{name}.csv"
    places: dict[str, Path] = {f"here ({p.name})": runner.path_of(name, p), "committed reference": committed}
    return [(source, runner.read(path)) for source, path in places.items()]


def splits(arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Table 9, the paper's data sets, and below them those of these arms, as their cards say."""
    rows = [
        {"data set": row.dataset, "in": "the paper", "train": row.train_images, "test": row.test_images, "classes": row.classes}
        for row in paper_numbers("table9").itertuples()
    ]  # fmt: skip
    for name in dict.fromkeys(member.data for arm in arms.values() for member in arm.spec.family()):
        known = source(name).facts
        rows.append({"data set": name, "in": "this notebook", **known.sizes, "classes": known.num_classes})
    counts = {name: f"{{{name}:,.0f}}" for name in ("train", "validation", "test", "classes")}
    return framed(rows, {"data set": "{data set}", "in": "{in}"} | counts)


# ---------------------------------------------------------------------------------------------------- leaks

LEAK_ROWS = {
    "linear": {"stem": "linear"},
    "hMLP, LayerNorm": {"stem": "hmlp", "stem_norm": "ln"},
    "hMLP, BatchNorm": {"stem": "hmlp", "stem_norm": "bn"},
    "convolutional": {"stem": "conv", "stem_norm": "bn"},
}


@functools.cache
def leak_maps() -> dict[tuple[str, str], np.ndarray]:
    """(stem, mode) -> how far each token moves when masked pixels change, (grid, grid)."""
    maps = {}
    for (name, stem), mode in itertools.product(LEAK_ROWS.items(), ("train", "eval")):
        leak = exact.leak_map(stem, training=mode == "train").numpy()
        maps[name, mode] = leak.reshape(2 * (round(len(leak) ** 0.5),))
    return maps


def leak_table() -> pd.DataFrame:
    """Change of tokens in percent of their length when masked pixels change: the visible ones, the masked ones."""
    rows = []
    for (stem, mode), leak in leak_maps().items():
        mask = exact.block_mask(len(leak)).numpy().reshape(leak.shape)
        visible = leak[~mask]
        rows.append({
            "stem": stem, "mode": mode, "moved": (visible > 0).sum(), "visible": visible.size,
            "largest": 100 * visible.max() if visible.max() else np.nan, "masked": 100 * leak[mask].mean(),
        })  # fmt: skip
    return framed(rows, {
        "stem": "{stem}", "mode": "{mode}", "visible tokens that move": "{moved} of {visible}",
        "largest change of a visible token": ("{largest:.1f} %", "0"), "mean change of a masked token": "{masked:.0f} %",
    })  # fmt: skip
