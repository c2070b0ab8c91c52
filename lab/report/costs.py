"""Memory and time: of fine-tuning (Figure 4, section 4), of more pairs or more width (Table 3), of branches at once (Table 4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lab import paths
from lab.bench import cases, runner
from lab.claims import exact
from lab.claims.ledger import ledger, part_hash
from lab.cost import count, plan
from lab.experiments.profiles import profile
from lab.paper import paper_table
from lab.report.printed import paper_throughput
from lab.report.tables import NOT_RUN
from lab.runs.execute import cores
from lab.runs.spec import RunSpec


def trained_shares() -> pd.DataFrame:
    """Figure 4 and section 4: what each strategy trains of ViT-B at 384, and the memory that it keeps, counted."""
    rows = []
    for strategy in ("full", "attn", "ffn", "head"):
        kept = exact.memory(strategy)
        trained, every = kept.gradients // 4, kept.weights // 4
        rows.append({
            "strategy": strategy, "trained_params": f"{trained:,}", "share of all": f"{100 * trained / every:.1f} %",
            "weights, MB": kept.weights, "gradients + AdamW state, MB": kept.gradients + kept.optimizer,
            "saved activations, MB an image": kept.activations, "all, batch of 1, MB": kept.total,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    for column in table.columns[3:]:
        table[column] = [_megabytes(value, table[column].iloc[0]) for value in table[column]]
    return table


def _megabytes(value: float, full: float | None = None, digits: int = 1) -> str:
    """Bytes as "226.9 (38.8 % less)" than `full`."""
    less = f" ({100 * (1 - value / full):.1f} % less)" if full and value != full else ""
    return f"{value / 2**20:,.{digits}f}{less}"


# ViT-B's memory is looked at for these: image size, attention, precision
SETTINGS = list(itertools.product((224, 384), ("explicit", "fused"), ("float32", "amp")))


def memory_savings(batch: int = 32) -> pd.DataFrame:
    """What attention-only saves of a step's memory, in all and of activations, by resolution, kernel and precision.

    Every token is computed in every layer, as in the released code; the last rows are a stack of today.
    """
    rows = []
    for size, attention, precision, skip in [(*s, False) for s in SETTINGS] + [
        (s, "fused", "amp", True) for s in (224, 384)
    ]:
        full, attn = (exact.memory(s, size, attention, precision, batch, skip) for s in ("full", "attn"))
        rows.append({
            "image_size": size, "attention": attention, "precision": precision,
            "last layer": "what is read" if skip else "all tokens",
            f"full, batch of {batch}, MB": _megabytes(full.total, digits=0),
            "attn, MB": _megabytes(attn.total, full.total, 0),
            "activations, full, MB": _megabytes(full.activations, digits=0),
            "activations, attn, MB": _megabytes(attn.activations, full.activations, 0),
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def figure4_memory() -> pd.DataFrame:
    """Figure 4's two peaks against what is counted, by resolution, kernel and precision.

    First the batch at which `full` alone explains its peak, and what attention-only would then need. Then the batch
    that explains the difference of both peaks, from which everything drops out that both need alike, counted or not:
    what is left of full's peak is then not counted. Last the saving that no batch falls below.
    """
    paper = paper_table("figure4").set_index("panel").loc["peak memory"]
    peak, peak_attn = (float(paper[s]) for s in ("full", "attn"))
    rows = []
    for setting in SETTINGS:
        (fixed, each), (fixed_attn, each_attn) = (_memory_line(s, *setting) for s in ("full", "attn"))
        batch = (peak - fixed) / each
        attn = fixed_attn + batch * each_attn
        apart = (peak - peak_attn - fixed + fixed_attn) / (each - each_attn)
        rows.append(dict(zip(("image_size", "attention", "precision"), setting, strict=True)) | {
            f"full = {peak:,.0f} MB at batch": f"{batch:.1f}",
            f"attn there, MB (paper: {peak_attn:,.0f})": f"{attn:,.0f} ({100 * (1 - attn / peak):.1f} % less)",
            f"full - attn = {peak - peak_attn:,.0f} MB at batch": f"{apart:.1f}",
            "full counted there, MB": f"{fixed + apart * each:,.0f}",
            "not counted, MB": f"{peak - fixed - apart * each:,.0f}",
            "never less than": f"{100 * (1 - each_attn / each):.1f} %",
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def _memory_line(strategy: str, image_size: int, attention: str, precision: str) -> tuple[float, float]:
    """A step's memory, all tokens computed, in MB: the fixed part and the part an image (exactly a line from 2 on)."""
    some, more = (exact.memory(strategy, image_size, attention, precision, n, False).total / 2**20 for n in (32, 33))
    return some - 32 * (more - some), more - some


def step_multiply_adds() -> pd.DataFrame:
    """Multiply-adds of a training step of ViT-B by kind of layer, forward and backward, full and attention-only."""
    rows = []
    for size in (224, 384):
        full, attn = (pd.DataFrame(exact.step_macs(s, size), index=count.Step._fields) for s in ("full", "attn"))
        full["all"], attn["all"] = full.sum(axis=1), attn.sum(axis=1)
        for kind in full:
            before, after = full[kind].sum(), attn[kind].sum()
            rows.append({
                "image_size": size, "kind": kind, "forward, gmacs_matmul": full.loc["forward", kind] / 1e9,
                "backward, full": full.loc["backward", kind] / 1e9, "backward, attn": attn.loc["backward", kind] / 1e9,
                "step, full": before / 1e9, "step, attn": after / 1e9, "spared, % of the step": 100 * (before - after) / full["all"].sum(),
            })  # fmt: skip
    table = pd.DataFrame(rows).query("kind != 'other'")
    return table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else str(value))


def step_costs(profile_name: str) -> pd.DataFrame:
    """A training step at the profile's own size: time from five process restarts, memory counted; nothing at smoke."""
    p = profile(profile_name)
    if not p.judged:
        return pd.DataFrame({"strategy": ["full", "attn", "ffn", "head"], "step": ["no timing at smoke"] * 4})
    part = ledger()[cases.F3]
    table = pd.DataFrame(cases.measured_evidence(p, part, part_hash(part.entry(p.name))))
    full, rows = table[table["arm"] == "full"], []
    for strategy, group in table.groupby("arm", sort=False):
        ratio = full["time_s"].to_numpy() / group["time_s"].to_numpy()
        rows.append({
            "strategy": strategy, "step": group["case"].iloc[0], "time_s": f"{group['time_s'].median():.4f}",
            "full over this, time_s": f"{ratio.mean():.3f} ± {ratio.std(ddof=1):.3f} (n={len(ratio)})",
            "mem_mb, counted": f"{group['mem_mb'].iloc[0]:.1f}",
            "full over this, mem_mb": f"{full['mem_mb'].iloc[0] / group['mem_mb'].iloc[0]:.3f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def form_memory() -> pd.DataFrame:
    """Table 3's memory: more pairs over the width of like cost, a training step and a forward pass, counted."""
    printed = paper_table("table3").set_index("model")["peak_mem_mb"].astype(float)
    rows = []
    for more, wide in exact.MORE_PAIRS.items():
        row = {"more pairs / more width": f"{more} / {wide}"}
        row["paper, MB"] = f"{printed[more]:.0f} / {printed[wide]:.0f}"
        row["paper, ratio"] = f"{printed[more] / printed[wide]:.2f}"
        for batch in (1, 32):
            ours = [exact.training_memory(name, batch).total for name in (more, wide)]
            row[f"training step, batch of {batch}, MB"] = " / ".join(f"{v / 2**20:,.0f}" for v in ours)
            row[f"ratio at {batch}"] = f"{ours[0] / ours[1]:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def inference_memory(batch: int = 256) -> pd.DataFrame:
    """Table 3's models, a forward pass at its peak in float32, counted: by way of attention, the paper's MB beside."""
    rows = []
    for row in paper_table("table3").itertuples():
        counts = {a: exact.inference_memory(row.model, batch, a) for a in ("explicit", "fused")}
        rows.append({
            "model": row.model, "paper, MB": row.peak_mem_mb, "weights, MB": _megabytes(counts["fused"].weights, digits=0),
            f"{batch} images, MB": _megabytes(counts["fused"].images, digits=0),
            **{f"all, {a} attention, MB": _megabytes(held.total, digits=0) for a, held in counts.items()},
        })  # fmt: skip
    return pd.DataFrame(rows)


def benchmark(name: str, profile_name: str) -> pd.DataFrame:
    """A benchmark's table: this machine's where it was run here, else the committed one; which of them is a column."""
    for source, path in _bench_paths(name, profile_name):
        if rows := runner.read(path):
            lines = [_bench_line(row) for row in runner.summary(rows).to_dict("records")]
            return pd.DataFrame([{"measured": source} | line for line in lines]).fillna("")
    return pd.DataFrame([{"benchmark": name, "measured": f"{NOT_RUN}: python -m lab bench {name}"}])


def _bench_line(row: dict) -> dict[str, str]:
    more = {"over timm": f"{row['over_timm']:.3g}"} if "over_timm" in row else {}
    return {
        "case": row["case"], "arm": row["arm"], "time_s": f"{row['time_s']:.4g}", "ratio": f"{row['ratio']:.3g}",
        "over": row["over"], "range (n restarts)": f"{row['low']:.3g} to {row['high']:.3g} (n={row['n']})", **more,
        "gmacs": f"{row['gmacs']:.3g}", "gbytes": f"{row['gbytes']:.3g}",
        "of matmul ceiling": f"{100 * row['of_matmul']:.0f} %", "of copy ceiling": f"{100 * row['of_copy']:.0f} %",
    } | {name: f"{row[name]:.4g}" for name in runner.MORE if row.get(name) == row.get(name) is not None}  # fmt: skip


def _bench_paths(name: str, profile_name: str) -> list[tuple[str, Path]]:
    return [
        (f"here ({profile_name})", runner.path_of(name, profile(profile_name))),
        ("committed reference", paths.REFERENCE / "cpu" / "bench" / f"{name}.csv"),
    ]


def throughput_figure(profile_name: str) -> Figure:
    """How many times as fast at once as one after the other, over the batch: the paper's V100 and what was measured."""
    figure, axes = plt.subplots(figsize=(8.5, 3.2), layout="constrained")
    table = paper_throughput()
    for i, (model, group) in enumerate(table.groupby("model", sort=False)):
        x, y = group["batch"].astype(int), group["par over seq"].astype(float)
        axes.plot(x, y, color=sns.color_palette()[i], marker="o", label=f"{model}, paper, V100")
    measured: dict[str, list[tuple[int, float]]] = {}
    for source, path in _bench_paths("branches", profile_name):
        for row in runner.read(path):
            if row["arm"] == "par" and row["case"].endswith("eager"):
                batch = int(row["case"].split("batch ")[1].split(",")[0])
                measured.setdefault(f"{row['case'].split('/')[0]}, {source}, {row['device']}", []).append(
                    (batch, row["ratio"])
                )
    for i, (label, found) in enumerate(measured.items()):
        middle = pd.DataFrame(found, columns=["batch", "ratio"]).groupby("batch")["ratio"].median()
        axes.plot(middle.index, middle, color=sns.color_palette()[2 + i], marker="D", linestyle="--", label=label)
    axes.axhline(1, color="0.2", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="batch", ylabel="par over seq, images a second")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plan_table(specs: Sequence[RunSpec], jobs: int) -> str:
    """What these runs cost, in one paragraph for the terminal."""
    workers = jobs or cores()
    c = plan.cost(specs, workers)
    return (
        f"{c.runs} runs, {c.missing} of them to train: about {c.cpu_s:,.0f} CPU seconds, "
        f"{c.wall_s / 60:.0f} minutes with {workers} workers, {c.mem_mb:,} MB of memory, {c.disk_mb:.0f} MB of disk"
    )
