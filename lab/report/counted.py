"""Tables of what is counted or timed and not trained: sizes, memory and multiply-adds, benchmarks, leaks, splits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from lab import paths
from lab.bench import cases, runner
from lab.claims import exact
from lab.claims.ledger import ledger
from lab.claims.statistics import prints_as
from lab.cost import count
from lab.experiments.catalogue import stem_model
from lab.experiments.profiles import Arm, Profile
from lab.experiments.small import STEM_ARMS
from lab.paper import paper_numbers, paper_table
from lab.report import paper
from lab.report.tables import NOT_RUN, columns, framed
from vitlib.model import ViT, ViTConfig, fuse, vit_config
from vitlib.train.finetune import PAPER_STRATEGIES

MB = 2**20
FORM = columns("width layers branches pairs", params=",")
MILLIONS = columns(params_m=".1f", gmacs=".2f") | {"paper": "{printed_params} M, {printed_gflops} G"}


# ---------------------------------------------------------------------------------------------------- sizes


def _size(config: ViTConfig) -> dict[str, float]:
    size = exact.size(config)
    form = {"width": config.width, "layers": config.depth, "branches": config.branches, "pairs": config.pairs}
    return form | {"params": size.params, "params_m": size.params / 1e6, "macs": size.macs, "gmacs": size.macs / 1e9}


def paper_models(name: str, *more: str) -> dict[str, ViTConfig]:
    """The models of a table or figure of the paper, with and without LayerScale as there, and others (with it) by name."""
    scaled = {row["model"]: row.get("layer_scale") == "yes" for row in paper_table(name).to_dict("records")}
    scaled |= dict.fromkeys(more, True)
    return {model: vit_config(model, layer_scale=1e-4 if scale else None) for model, scale in scaled.items()}


def sizes(models: Mapping[str, ViTConfig]) -> pd.DataFrame:
    """Parameters and multiply-adds of each model, counted; the values of Table 3 beside, where it has them."""
    printed = {r.model: {"printed_params": r.params_m, "printed_gflops": r.gflops} for r in paper.rows("table3")}
    rows = [{"model": name} | _size(config) | printed.get(name, {}) for name, config in models.items()]
    return framed(rows, columns("model") | FORM | MILLIONS)


def table1_sizes() -> pd.DataFrame:
    """The models of Table 1 with LayerScale and without: counted, and whether that prints as the paper prints it."""
    rows = []
    for row in paper.rows("table1"):
        size = _size(vit_config(row.model, layer_scale=1e-4 if row.layer_scale == "yes" else None))
        same = prints_as(size["params_m"], row.params_m) and prints_as(size["gmacs"], row.gflops)
        printed = {"printed_params": row.params_m, "printed_gflops": row.gflops, "same": "yes" if same else "no"}
        rows.append({"model": row.printed_name, "scale": row.layer_scale} | size | printed)
    layout = columns("model") | {"LayerScale": "{scale}"} | columns(params=",") | MILLIONS
    return framed(rows, layout | {"to the printed digit": "{same}"})


def arm_sizes(arms: Mapping[str, Arm]) -> pd.DataFrame:
    """The models that a notebook trains, counted."""
    rows = [{"arm": label} | _size(arm.spec.model) for label, arm in arms.items()]
    return framed(rows, columns("arm") | FORM | {"multiply-adds": "{macs:,}"})


def fused_sizes() -> pd.DataFrame:
    """What `fuse` makes of the models of Table 4: the same multiply-adds in half the layers."""
    with torch.device("meta"):
        models = [ViT(vit_config(name, layer_scale=1e-4)).eval() for name in ("S18x2", "B18x2")]
        models = [one for model in models for one in (model, fuse(model))]
        rows = [
            {"model": m.config.name, "layers": m.config.depth, "branches": m.config.branches, "heads": m.config.heads}
            | {"ffn": m.config.ffn_width or 4 * m.config.width, "params": count.params(m)}
            | {"gmacs_matmul": count.macs(m).matmul / 1e9} for m in models
        ]  # fmt: skip
    layout = columns("model layers branches heads") | {"FFN width": "{ffn}"}
    return framed(rows, layout | columns(params=",", gmacs_matmul=".3f"))


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
            here, linear = (exact.size(stem_model(p, stem)).macs for stem in (name, "linear"))
            row["more here"] = 100 * (here / linear - 1)
        rows.append(row)
    layout = columns("stem model norm act", params=",", gmacs=".3f") | {"paper, GFLOPs": "{printed}"}
    layout |= {"ours minus paper": ("{apart:+.2f} %", "{same}"), "more than linear": "{more:+.2f} %"}
    more = {f"more than linear, {stem_model(p, 'linear').name}": "{more here:+.2f} %"} if p is not None else {}
    return framed(rows, layout | more)


# ---------------------------------------------------------------------------------------------------- fine-tuning

# ViT-B's memory is looked at for these: image size, attention, precision
SETTINGS = list(itertools.product((224, 384), ("explicit", "fused"), ("float32", "amp")))
NAMES = ("image_size", "attention", "precision")


def _less(value: float, full: float, name: str) -> dict[str, float]:
    """A number of MB, and by how many percent it is less than `full`, where it is."""
    return {name: value, f"{name} less": 100 * (1 - value / full) if value != full else np.nan}


def _megabytes(column: str, digits: int = 0) -> tuple[str, str]:
    """ "226.9 (38.8 % less)", or the number alone."""
    number = f"{{{column}:,.{digits}f}}"
    return f"{number} ({{{column} less:.1f}} % less)", number


def trained_shares() -> pd.DataFrame:
    """Figure 4 and section 4: what each strategy trains of ViT-B at 384, and the memory in MB that it keeps, counted."""
    kept = {strategy: exact.memory(strategy) for strategy in PAPER_STRATEGIES}
    columns_of = {
        "weights, MB": lambda m: m.weights, "gradients + AdamW state, MB": lambda m: m.gradients + m.optimizer,
        "saved activations, MB an image": lambda m: m.activations, "all, batch of 1, MB": lambda m: m.total,
    }  # fmt: skip
    rows = []
    for strategy, m in kept.items():
        row = {"strategy": strategy, "trained": m.gradients // 4, "share": 100 * m.gradients / m.weights}
        for name, of in columns_of.items():
            row |= _less(of(m) / MB, of(kept["full"]) / MB, name)
        rows.append(row)
    layout = columns("strategy") | {"trained_params": "{trained:,}", "share of all": "{share:.1f} %"}
    return framed(rows, layout | {name: _megabytes(name, 1) for name in columns_of})


def memory_savings(batch: int = 32) -> pd.DataFrame:
    """What attention-only saves of a step's memory in MB, in all and of activations, by resolution, kernel and precision.

    Every token is computed in every layer, as in the released code; the last rows are a stack of today.
    """
    rows = []
    for *setting, skip in [(*s, False) for s in SETTINGS] + [(size, "fused", "amp", True) for size in (224, 384)]:
        full, attn = (exact.memory(s, *setting, batch, skip) for s in ("full", "attn"))
        row = dict(zip(NAMES, setting, strict=True)) | {"layer": "what is read" if skip else "all tokens"}
        row |= {"full": full.total / MB, "full activations": full.activations / MB}
        row |= _less(attn.total / MB, row["full"], "attn")
        rows.append(row | _less(attn.activations / MB, row["full activations"], "attn activations"))
    return framed(rows, columns(" ".join(NAMES)) | {
        "last layer": "{layer}", f"full, batch of {batch}, MB": "{full:,.0f}", "attn, MB": _megabytes("attn"),
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
        batch, apart = (peak - fixed) / each, (peak - peak_attn - fixed + fixed_attn) / (each - each_attn)
        row = dict(zip(NAMES, setting, strict=True)) | {"batch": batch, "batch apart": apart}
        row |= {"counted": fixed + apart * each, "rest": peak - fixed - apart * each}
        rows.append(row | {"least": 100 * (1 - each_attn / each)} | _less(fixed_attn + batch * each_attn, peak, "attn"))
    return framed(rows, columns(" ".join(NAMES)) | {
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
        steps = (count.step_macs(vit_config("B12", image_size=size, layer_scale=1e-4), s) for s in ("full", "attn"))
        full, attn = (pd.DataFrame(step, index=count.Step._fields) / 1e9 for step in steps)
        full["all"], attn["all"] = full.sum(axis=1), attn.sum(axis=1)
        rows += [{
            "image_size": size, "kind": kind, "forward, gmacs_matmul": full[kind]["forward"],
            "backward, full": full[kind]["backward"], "backward, attn": attn[kind]["backward"],
            "step, full": full[kind].sum(), "step, attn": attn[kind].sum(),
            "spared, % of the step": 100 * (full[kind] - attn[kind]).sum() / full["all"].sum(),
        } for kind in full if kind != "other"]  # fmt: skip
    return framed(rows, columns("image_size kind", **dict.fromkeys([*rows[0]][2:], ".3f")))


def step_costs(p: Profile) -> pd.DataFrame:
    """A training step at the profile's own size: time from five process restarts, memory counted; where F3 is measured."""
    layout, rows, part = columns("strategy step"), [], ledger().part(cases.F3)
    if p.name not in part.n:
        return framed([{"strategy": s, "step": f"no timing at {p.name}"} for s in PAPER_STRATEGIES], layout)
    table = pd.DataFrame(cases.measured_evidence(p, part, ledger().hash(part, p.name)))
    full = table[table["arm"] == "full"]
    for strategy, group in table.groupby("arm", sort=False):
        ratio, memory = full["time_s"].to_numpy() / group["time_s"].to_numpy(), group["mem_mb"].iloc[0]
        rows.append({
            "strategy": strategy, "step": group["case"].iloc[0], "time_s": group["time_s"].median(), "ratio": ratio.mean(),
            "sd": ratio.std(ddof=1), "n": len(ratio), "memory": memory, "memory ratio": full["mem_mb"].iloc[0] / memory,
        })  # fmt: skip
    return framed(rows, layout | columns(time_s=".4f") | {
        "full over this, time_s": "{ratio:.3f} ± {sd:.3f} (n={n})", "mem_mb, counted": "{memory:.1f}",
        "full over this, mem_mb": "{memory ratio:.3f}",
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------- Tables 3, 4 and 9


def form_memory() -> pd.DataFrame:
    """Table 3's memory in MB: more pairs over the width of like cost, counted: inference as in the table, and a training step,
    which is ours and without a verdict.
    """
    printed, rows = paper_numbers("table3").set_index("model")["peak_mem_mb"], []
    layout = {"more pairs / more width": "{models}", "paper, MB": "{paper more} / {paper wide}"}
    layout |= {"paper, ratio": "{paper ratio:.2f}"}
    for more, wide in exact.MORE_PAIRS.items():
        row = {"models": f"{more} / {wide}", "paper more": printed[more], "paper wide": printed[wide]}
        for batch, (name, model) in itertools.product((1, 32), (("more", more), ("wide", wide))):
            step = count.memory(exact.table3_config(model), "full", batch=batch, skip_unread=False)
            row[f"{batch} {name}"] = step.total / MB
        rows.append(row | {f"{at} ratio": row[f"{at} more"] / row[f"{at} wide"] for at in ("paper", 1, 32)})
    for batch in (1, 32):
        layout[f"training step, batch of {batch}, MB"] = f"{{{batch} more:,.0f}} / {{{batch} wide:,.0f}}"
        layout[f"ratio at {batch}"] = f"{{{batch} ratio:.2f}}"
    return framed(rows, layout)


def inference_memory(batch: int = 256) -> pd.DataFrame:
    """Table 3's models, a forward pass at its peak in float32, counted, in MB, by kernel of attention; the paper's beside."""
    rows = []
    for row in paper_numbers("table3").itertuples():
        explicit, fused = (exact.inference_memory(row.model, batch, kernel) for kernel in ("explicit", "fused"))
        held = {"weights": fused.weights, "images": fused.images, "explicit": explicit.total, "fused": fused.total}
        rows.append({"model": row.model, "paper": row.peak_mem_mb} | {name: size / MB for name, size in held.items()})
    return framed(rows, {
        "model": "{model}", "paper, MB": "{paper}", "weights, MB": "{weights:,.0f}", f"{batch} images, MB": "{images:,.0f}",
        **{f"all, {kernel} attention, MB": f"{{{kernel}:,.0f}}" for kernel in ("explicit", "fused")},
    })  # fmt: skip


def benchmark(name: str, p: Profile) -> pd.DataFrame:
    """A benchmark's table: this machine's where it was run here, else the committed one; which of them is a column.

    Medians over process restarts; the ratio to the reference arm with its range over them.
    """
    measured, stored = next(((place, rows) for place, rows in bench_rows(name, p).items() if rows), ("", []))
    if not stored:
        missing = {"benchmark": name, "measured": f"{NOT_RUN}: python -m lab bench {name}"}
        return framed([missing], columns("benchmark measured"))
    table = runner.summary(stored).assign(measured=measured)
    layout = columns("measured case arm", time_s=".4g", ratio=".3g") | columns("over")
    layout |= {"range (n restarts)": "{low:.3g} to {high:.3g} (n={n})", "over timm": "{over_timm:.3g}"}
    return framed(table, layout | columns(gmacs=".3g", **dict.fromkeys(runner.MORE, ".4g")), always=())


def bench_rows(name: str, p: Profile) -> dict[str, list[dict]]:
    """Where a benchmark was measured, and its rows: here, and the committed ones."""
    committed = paths.REFERENCE / "cpu" / "bench" / f"{name}.csv"
    places = {f"here ({p.name})": runner.path_of(name, p), "committed reference": committed}
    return {place: runner.read(path) for place, path in places.items()}


def splits(arms: Mapping[str, Arm]) -> pd.DataFrame:
    """Table 9, the paper's data sets, and below them those of these arms, as their cards say."""
    rows = [
        {"data": row.dataset, "in": "the paper", "train": row.train_images, "test": row.test_images, "classes": row.classes}
        for row in paper_numbers("table9").itertuples()
    ]  # fmt: skip
    known = {member.data: member.facts for arm in arms.values() for member in arm.spec.family()}
    for name, facts in known.items():
        rows.append({"data": name, "in": "this notebook", **facts.sizes, "classes": facts.num_classes})
    counts = dict.fromkeys(("train", "validation", "test", "classes"), ",")
    return framed(rows, {"data set": "{data}"} | columns("in", **counts))


# ---------------------------------------------------------------------------------------------------- leaks

LEAK_ROWS = {
    "linear": {"stem": "linear"}, "hMLP, LayerNorm": {"stem": "hmlp", "stem_norm": "ln"},
    "hMLP, BatchNorm": {"stem": "hmlp", "stem_norm": "bn"}, "convolutional": {"stem": "conv", "stem_norm": "bn"},
}  # fmt: skip


@functools.cache
def leak_maps() -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(stem, mode) -> how far each token moves when masked pixels change, and which are masked, (grid, grid) each."""
    maps = {}
    for (name, stem), mode in itertools.product(LEAK_ROWS.items(), ("train", "eval")):
        leak = exact.leak_map(stem, training=mode == "train").numpy()
        grid = round(len(leak) ** 0.5)
        maps[name, mode] = leak.reshape(grid, grid), exact.block_mask(grid).numpy().reshape(grid, grid)
    return maps


def leak_table() -> pd.DataFrame:
    """Change of tokens in percent of their length when masked pixels change: the visible ones, the masked ones."""
    rows = []
    for (stem, mode), (leak, mask) in leak_maps().items():
        visible, masked = leak[~mask], 100 * leak[mask].mean()
        row = {"stem": stem, "mode": mode, "moved": (visible > 0).sum(), "visible": visible.size}
        rows.append(row | {"largest": 100 * visible.max() or np.nan, "masked": masked})
    return framed(rows, columns("stem mode") | {
        "visible tokens that move": "{moved} of {visible}", "largest change of a visible token": ("{largest:.1f} %", "0"),
        "mean change of a masked token": "{masked:.0f} %",
    })  # fmt: skip
