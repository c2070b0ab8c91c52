"""Notebook 61: trained weights regrouped into branches, and the commutation gap that decides what it costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lab.experiments.catalogue import Runs
from lab.report.tables import Layout, columns, framed, spread, spread_of, summary
from lab.runs import store
from lab.runs.execute import data_of
from lab.runs.spec import RunSpec
from vitlib.model import ViT, commutation_gap, regroup
from vitlib.train import supervised

IMAGES = 500  # that the gap is measured on


def trunks(runs: Runs) -> dict[str, list[RunSpec]]:
    """The sequential models whose weights are here: label -> one run per seed. Imported runs have metrics only."""
    setting = runs.experiment
    found = {label: setting.seeds_of(label) for label, arm in setting.arms.items() if arm.column == "trained"}
    return {label: [s for s in specs if store.weights_path(s).is_file()] for label, specs in found.items()}


def model_of(spec: RunSpec) -> ViT:
    model = ViT(spec.model)
    model.load_state_dict(store.weights(spec))
    return model.eval()


def accuracies(runs: Runs) -> pd.DataFrame:
    """Top-1 of each grouping of the trained weights: as they are, after tuning everything, after tuning attention alone.

    One row per number of branches, with LayerScale and without; the last column is trained in that form from the start.
    """
    rows = []
    for label, specs in trunks(runs).items():
        for k in (k for k in range(1, 13) if specs and specs[0].model.pairs % k == 0):
            as_is = [
                100 * float(supervised.evaluate(regroup(model_of(s), k), data_of(s, s.split))[1].mean()) for s in specs
            ]
            form = f"{specs[0].model.pairs // k}x{k}{label[label.find('+') :] if '+' in label else ''}"
            row = {"form": form, "branches": k} | spread_of(as_is, "as is ")
            for strategy in ("full", "attn"):
                if results := runs.results.get(f"{form} {strategy}"):
                    row |= summary(results, prefix=f"{strategy} ")
            rows.append(row)
    layout: Layout = columns("form") | {"regrouped, nothing trained": spread("as is ")}
    layout |= {"everything trained for a short while": spread("full "), "attention alone": spread("attn ")}
    return framed(rows, layout)


def gaps(runs: Runs) -> pd.DataFrame:
    """The commutation gap of every layer, part, seed and model: a row each."""
    rows = []
    for label, specs in trunks(runs).items():
        for spec in specs:
            data, model = data_of(spec, spec.split), model_of(spec)
            images = data.normalise(data.images[:IMAGES])
            for part, values in commutation_gap(model, images).items():
                scale = [getattr(layer, part)[0].gamma for layer in model.layers]
                for i, value in enumerate(values.tolist(), start=2):
                    gamma = np.nan if scale[i - 1] is None else float(scale[i - 1].detach().abs().mean())
                    rows.append(
                        {"model": label, "seed": spec.seed, "layer": i, "part": part, "gap": value, "gamma": gamma}
                    )
    layout = columns("model seed layer part") | {"gap": "{gap:.3f}", "mean |gamma|": "{gamma:.4f}"}
    return framed(pd.DataFrame(rows, columns=["model", "seed", "layer", "part", "gap", "gamma"]), layout)


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
    drawn, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    sns.lineplot(table, x="layer", y="gap", hue="model", style="part", markers=True, errorbar="sd", ax=left)
    left.set(yscale="log", ylabel="|r'(y) - r'(x)| / |r'(x)|")
    left.legend(fontsize="x-small")
    for i, (scaled, rows) in enumerate(accuracy.groupby(accuracy["form"].str.contains("LS"), sort=False)):
        name = "LayerScale" if scaled else "no LayerScale"
        for kind, style in (("as is", "o-"), ("full", "s--"), ("attn", "^:")):
            if f"{kind} mean" in rows:
                look = {
                    "color": sns.color_palette()[i],
                    "label": f"{name}, {'nothing trained' if kind == 'as is' else kind}",
                }
                right.errorbar(rows["branches"], rows[f"{kind} mean"], rows[f"{kind} sd"].fillna(0), fmt=style, **look)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 3, 4, 6, 12], ["1", "2", "3", "4", "6", "12"])
    right.minorticks_off()
    right.set(xlabel="branches", ylabel="top-1, %")
    right.legend(fontsize="x-small")
    return drawn
