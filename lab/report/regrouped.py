"""Notebook 61: trained weights regrouped into branches, and the commutation gap that decides what it costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lab.experiments.catalogue import Runs
from lab.report.tables import columns, framed, spread, spread_of, summary
from lab.runs import store
from lab.runs.execute import data_of, trained_model
from lab.runs.spec import RunSpec
from vitlib.model import commutation_gap, regroup
from vitlib.train import supervised

IMAGES = 500  # that the gap is measured on


def trunks(runs: Runs) -> dict[str, list[RunSpec]]:
    """The sequential models whose weights are here: label -> one run per seed. Imported runs have metrics only."""
    trained = [label for label, arm in runs.experiment.arms.items() if arm.column == "trained"]
    return {a: [s for s in runs.experiment.seeds_of(a) if store.weights_path(s).is_file()] for a in trained}


def accuracies(runs: Runs) -> pd.DataFrame:
    """Top-1 of the trained weights by number of branches: as they are, after tuning everything or attention alone."""
    rows = []
    for label, specs in trunks(runs).items():
        for k in (k for k in range(1, 13) if specs and specs[0].model.pairs % k == 0):
            as_is = [supervised.evaluate(regroup(trained_model(s), k), data_of(s, s.split))[0]["top1"] for s in specs]
            form = f"{specs[0].model.pairs // k}x{k}{label[label.find('+') :] if '+' in label else ''}"
            row = {"form": form, "branches": k} | spread_of(as_is, "as is ")
            for strategy in ("full", "attn"):
                row |= summary(runs.results.get(f"{form} {strategy}", ()), prefix=f"{strategy} ")
            rows.append(row)
    layout = columns("form") | {"regrouped, nothing trained": spread("as is ")}
    layout |= {"everything trained for a short while": spread("full "), "attention alone": spread("attn ")}
    return framed(rows, layout)


def gaps(runs: Runs) -> pd.DataFrame:
    """The commutation gap of every layer, part, seed and model, and the mean of LayerScale's factors there: a row each."""
    rows = []
    for label, specs in trunks(runs).items():
        for spec in specs:
            data, model = data_of(spec, spec.split), trained_model(spec)
            for part, values in commutation_gap(model, data.normalise(data.images[:IMAGES])).items():
                for i, value in enumerate(values.tolist(), start=2):
                    scale = getattr(model.layers[i - 1], part)[0].gamma
                    gamma = np.nan if scale is None else float(scale.detach().abs().mean())
                    rows.append((label, spec.seed, i, part, value, gamma))
    return pd.DataFrame(rows, columns=["model", "seed", "layer", "part", "gap", "gamma"])


def mean_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and part: the mean gap over layers and seeds, its largest value, and how large LayerScale's factors are."""
    found = table.groupby(["model", "part"], sort=False).agg(
        gap=("gap", "mean"), largest=("gap", "max"), gamma=("gamma", "mean"), n=("seed", "nunique")
    )
    return framed(found.reset_index(), columns("model part") | {
        "gap, mean over layers": "{gap:.3f}", "largest": "{largest:.3f}", "mean |gamma|": "{gamma:.4f}", "n": "{n}",
    })  # fmt: skip


def figure(table: pd.DataFrame, accuracy: pd.DataFrame) -> Figure:
    """Left: the gap over the layers. Right: what regrouping costs, by the number of branches."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
    sns.lineplot(table, x="layer", y="gap", hue="model", style="part", markers=True, errorbar="sd", ax=left)
    left.set(yscale="log", ylabel="|r'(y) - r'(x)| / |r'(x)|")
    left.legend(fontsize="x-small")
    for i, (scaled, rows) in enumerate(accuracy.groupby(accuracy["form"].str.contains("LS"), sort=False)):
        name = "LayerScale" if scaled else "no LayerScale"
        for kind, style in (("as is", "o-"), ("full", "s--"), ("attn", "^:")):
            if f"{kind} mean" in rows:
                label = f"{name}, {'nothing trained' if kind == 'as is' else kind}"
                look = {"color": sns.color_palette()[i], "label": label}
                right.errorbar(rows["branches"], rows[f"{kind} mean"], rows[f"{kind} sd"].fillna(0), fmt=style, **look)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 3, 4, 6, 12], ["1", "2", "3", "4", "6", "12"])
    right.minorticks_off()
    right.set(xlabel="branches", ylabel="top-1, %")
    right.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return drawn
