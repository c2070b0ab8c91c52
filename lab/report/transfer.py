"""Table 6: other data, by strategy, number of images and width."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lab.data.registry import facts
from lab.experiments.catalogue import NOTEBOOKS, Runs, experiment
from lab.paper import paper_table
from lab.report.accuracy import contrast, points, top1
from lab.report.printed import paper_transfer
from lab.report.tables import NOT_RUN, reference_table
from vitlib.train.finetune import STRATEGIES


def splits() -> pd.DataFrame:
    """Table 9, the paper's data sets, and below them the embedded ones, as their cards say."""
    rows = [
        {"data set": row.dataset, "in": "the paper", "train": int(row.train_images), "test": int(row.test_images),
         "classes": int(row.classes)}
        for row in paper_table("table9").itertuples()
    ]  # fmt: skip
    for name in dict.fromkeys(m.data for s in experiment("42", "study").arms.values() for m in s.family()):
        known = facts(name)
        rows.append({"data set": name, "in": "this notebook", **known.sizes, "classes": known.num_classes})
    table = pd.DataFrame(rows)[["data set", "in", "train", "validation", "test", "classes"]]
    return table.map(lambda n: "–" if pd.isna(n) else f"{n:,.0f}" if isinstance(n, int | float) else n)


def transfer_table(arm_runs: Runs) -> pd.DataFrame:
    """Our rows in the form of `paper_transfer`: top-1 of each strategy by data set, images and model.

    The committed reference comes first, then this run; what is missing says so. All strategies of a row start from the
    same tensors and images, so that they share their first loss.
    """
    own = f"this run ({arm_runs.experiment.profile.name})"
    rows = []
    for setting in dict.fromkeys(arm.rpartition(" ")[0] for arm in arm_runs.results):
        _, data, images = setting.split()
        found = {s: arm_runs.results.get(f"{setting} {s}") for s in (*STRATEGIES, "scratch")}
        model = next(spec.model for arm, spec in arm_runs.experiment.arms.items() if arm.startswith(f"{setting} "))
        row = {"measured": own, "data set": data, "images": f"{int(images):,}", "model": model.name.partition("/")[0]}
        row |= {f"top1, {s}": top1(results) if results else "–" for s, results in found.items()}
        whole = found["attn"] and found["full"]
        row["attn - full, points"] = _transfer_gap(arm_runs, setting) if whole else "–"
        first = next(results for results in found.values() if results)[0]
        rows.append(row | {"first_loss": f"{first.metrics['first_loss']:.5f}"})
    committed = _committed_rows() or [{"measured": f"committed reference: {NOT_RUN}"}]
    return pd.DataFrame(committed + (rows or [{"measured": f"{own}: {NOT_RUN}"}])).fillna("–")


def _transfer_gap(arm_runs: Runs, setting: str) -> str:
    """attn - full in points, with its interval where there are two seeds."""
    attn, full = f"{setting} attn", f"{setting} full"
    if estimate := contrast(arm_runs, attn, full):
        return points(estimate)
    attn, full = (arm_runs.results[arm][0].metrics["top1"] for arm in (attn, full))
    return f"{attn - full:+.2f}"


def _committed_rows() -> list[dict]:
    """The rows of the committed reference's own run, so labelled; none until there is one."""
    table = reference_table(NOTEBOOKS["42"][0])
    if table is None:
        return []
    table = table[table["measured"] == "this run (study)"]
    return table.assign(measured="committed reference").to_dict("records")


def transfer_figure(table: pd.DataFrame) -> Figure:
    """attn - full over the number of images: the paper's in one panel, then one for each data set of `transfer_table`.

    A line a width; bars are 95 % intervals. Solid: this run; dashed: the committed reference.
    """
    table = table.reindex(columns=["measured", "data set", "images", "model", "attn - full, points"])
    table = table[table["attn - full, points"].fillna("–") != "–"]
    data = list(dict.fromkeys(table["data set"]))
    figure, panels = plt.subplots(
        1, 1 + len(data), figsize=(3.4 + 2.7 * len(data), 3.2), layout="constrained", squeeze=False
    )
    for i, (model, rows) in enumerate(paper_transfer().groupby("model", sort=False)):
        x, y = (rows[name].str.replace(",", "").astype(float) for name in ("images", "attn - full"))
        panels[0][0].plot(x, y, "Dos"[i], color=sns.color_palette()[7 + i], label=model)
    for panel, name in zip(panels[0][1:], data, strict=True):
        for i, (model, found) in enumerate(table[table["data set"] == name].groupby("model")):
            for measured, rows in found.groupby("measured"):
                x = rows["images"].str.replace(",", "").astype(float)
                y = rows["attn - full, points"].str.extract(r"^(\S+)(?: \[(\S+), (\S+)\])?$").astype(float)
                error = None if y[1].isna().any() else [y[0] - y[1], y[2] - y[0]]
                style = "--" if measured.startswith("committed") else "-"
                label = f"{model.split('-')[0]}, {measured}"
                panel.errorbar(
                    x, y[0], error, fmt="os"[i % 2] + style, capsize=4, color=sns.color_palette()[i], label=label
                )
    for panel, name in zip(panels[0], ["the paper's six data sets", *data], strict=True):
        panel.axhline(0, color="0.2", linewidth=1)
        panel.set_xscale("log")
        panel.set(title=name, xlabel="training images")
        if name in data:
            ticks = sorted({int(n.replace(",", "")) for n in table[table["data set"] == name]["images"]})
            panel.set_xticks(ticks, [f"{n:,}" for n in ticks])
            panel.minorticks_off()
    panels[0][0].set_ylabel("top-1 of attn minus full, points")
    panels[0][0].legend(fontsize="small")
    if data:
        figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure
