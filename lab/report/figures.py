"""Figures of the notebooks, drawn from frames of numbers: one function each. Whiskers are 95 % intervals.

Below `imagenet` a figure plots differences to the reference arm, since accuracies of different data share no axis.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from lab.data.cards import source, title_of
from lab.experiments import small
from lab.experiments.catalogue import Runs, arms_of
from lab.experiments.profiles import PROFILES, Profile
from lab.report import paper
from lab.report.counted import LEAK_ROWS, bench_rows, leak_maps
from lab.report.tables import TRAININGS, gap
from lab.runs import execute, store
from lab.runs.spec import RunSpec
from vitlib.data import DataSet
from vitlib.train import masked, tokenizers

BOUNDS = ("points", "low", "high")


def whiskers(table: pd.DataFrame, prefix: str = "") -> np.ndarray:
    """How far each interval reaches below and above its mean, (2, rows); NaN, and not drawn, with one seed."""
    points, low, high = (table[f"{prefix}{name}"].to_numpy(float) for name in BOUNDS)
    return np.stack([points - low, high - points])


def with_columns(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The table with these columns, empty where it has none."""
    return table.reindex(columns=list(dict.fromkeys([*table, *names])))


def pictures(rows: Mapping[str, Sequence[np.ndarray]], figsize: tuple[float, float]) -> Figure:
    """Images (H, W, C) from 0 to 1 side by side, a named row each."""
    figure, axes = plt.subplots(
        len(rows), len(next(iter(rows.values()))), figsize=figsize, squeeze=False, layout="constrained"
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
        line[0].set_ylabel(name)
    return figure


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def one_of_each(data: DataSet) -> np.ndarray:
    """The first image of each class, by its row."""
    return np.unique(data.labels.numpy(), return_index=True)[1]


def images_figure(p: Profile, count: int) -> tuple[Figure, str]:
    """The first images of a data set in memory with their labels, at the size that the models read; and a caption."""
    data = source(p.data).open("test", p.image_size)
    figure = pictures({"": channels_last(data.images[:count]) / 255}, (8, 1.3))
    names = [data.classes[label] for label in data.labels[:count].tolist()]
    for panel, name in zip(figure.axes, names, strict=True):
        panel.set_title(name, fontsize="x-small")
    about = f"{title_of(p.data)}, the first test images at {p.image_size} pixels: {', '.join(names)}."
    return figure, about


def loss_figure(runs: Runs) -> Figure:
    """The training loss of every run, smoothed over a twentieth of its steps: a colour per arm, a line per seed."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for i, label in enumerate(runs.results):
        for k, spec in enumerate(runs.experiment.seeds_of(label)):
            if (history := store.history(spec)) is not None:
                loss = history["loss"].rolling(max(len(history) // 20, 1), min_periods=1).mean()
                axes.plot(history["step"], loss, color=f"C{i % 10}", linewidth=0.9, label=label if k == 0 else None)
    axes.set(xlabel="step", ylabel="training loss")
    if len(runs.results) <= 12:
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def difference_figure(runs: Runs, reference: str, xlabel: str) -> Figure:
    """Points above the reference arm: one dot per seed, the mean with its interval over seeds and images.

    Without these runs: only that sentence.
    """
    arms = [arm for arm in runs.results if arm != reference]
    if not arms or reference not in runs.results:
        figure = plt.figure(figsize=(6, 0.6))
        figure.text(0.5, 0.5, f"no runs at {runs.experiment.profile.name}", ha="center", va="center")
        return figure
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for x, arm in enumerate(arms):
        both = zip(runs.results[arm], runs.results[reference], strict=False)
        by_seed = [a.metrics["top1"] - b.metrics["top1"] for a, b in both]
        axes.plot([x] * len(by_seed), by_seed, "o", color="0.55", markersize=5)
    gaps = pd.DataFrame([{"x": x} | gap(runs, arm, reference) for x, arm in enumerate(arms)])
    table = with_columns(gaps, *BOUNDS).dropna()
    axes.errorbar(table["x"], table["points"], whiskers(table), fmt="D", capsize=4, color=sns.color_palette()[0])
    axes.axhline(0, color="0.2", linewidth=1)
    axes.set_xticks(range(len(arms)), arms, rotation=30 if len(arms) > 6 else 0)
    axes.set(xlabel=xlabel, ylabel=f"top-1 minus {reference}, points", xlim=(-0.5, len(arms) - 0.5))
    return figure


def gap_figure(table: pd.DataFrame, chart: pd.DataFrame, size: str) -> Figure:
    """Two branches minus one over the width or the pairs: `tables.gaps`, and the paper's chart (`paper.gaps`)."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    measured = with_columns(table, size, *BOUNDS).dropna(subset="points")
    label = f"{measured['measured'].iloc[0]}, n = {measured['n'].iloc[0]}" if len(measured) else "not run"
    axes.errorbar(measured[size], measured["points"], whiskers(measured), fmt="D-", capsize=4, label=label)
    for i, (family, group) in enumerate([("", chart)] if size == "width" else chart.groupby("model_family"), start=1):
        look = {"color": sns.color_palette()[i], "label": f"paper{', ' * bool(family)}{family}, ImageNet, chart ± 0.1"}
        axes.plot(group[size], group["points"], "os"[i % 2] + "--", markerfacecolor="none", **look)
    axes.axhline(0, color="0.2", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({*measured[size], *chart[size]})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set(xlabel=size, ylabel="two branches minus one, points")
    axes.legend(fontsize="small")
    return figure


def transfer_figure(table: pd.DataFrame) -> Figure:
    """attn - full over the number of images: the paper's, hollow, by model; ours, filled, with intervals (`tables.transfer`)."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for i, (model, rows) in enumerate(paper.transfer().groupby("model", sort=False)):
        look = {"markerfacecolor": "none", "color": sns.color_palette()[i], "label": f"{model}, the paper"}
        axes.plot(rows["images"], rows["points"], "Dos"[i], **look)
    table = with_columns(table, *BOUNDS).dropna(subset="points")
    for i, ((name, width, measured), rows) in enumerate(table.groupby(["data", "width", "measured"], sort=False)):
        look = {"color": sns.color_palette()[(3 + i) % 10], "label": f"{name}, width {width:.0f}, {measured}"}
        axes.errorbar(rows["images"], rows["points"], whiskers(rows), fmt="os^v"[i % 4], capsize=3, **look)
    axes.axhline(0, color="0.2", linewidth=1)
    axes.set(xscale="log", xlabel="training images", ylabel="top-1 of attn minus full, points")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def throughput_figure(p: Profile) -> Figure:
    """How many times as fast at once as one after the other, over the batch: the paper's V100 and what was measured."""
    figure, axes = plt.subplots(figsize=(8.5, 3.2), layout="constrained")
    for model, group in paper.throughput().groupby("model", sort=False):
        axes.plot(group["batch"], group["ratio"], "o-", label=f"{model}, paper, V100")
    for place, rows in bench_rows("branches", p).items():
        eager = [row for row in rows if row["arm"] == "par" and row["case"].endswith("eager")]
        table = pd.DataFrame(eager, columns=["case", "device", "ratio"])
        table[["model", "batch"]] = table["case"].astype(str).str.extract(r"^([^/]+)/.*batch (\d+)")
        for (model, device), group in table.astype({"batch": int}).groupby(["model", "device"], sort=False):
            middle = group.groupby("batch")["ratio"].median()
            axes.plot(middle.index, middle, "D--", label=f"{model}, {place}, {device}")
    axes.axhline(1, color="0.2", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="batch", ylabel="par over seq, images per second")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def stem_figure(table: pd.DataFrame, name: str) -> Figure:
    """Figure 6's form, in points above the linear stem: across with labels alone, up after masked pre-training.

    `table` is `tables.table7`, `name` its profile's. One point per stem that has both: the paper's Table 7, then ours. Above the
    diagonal a stem gains more by pre-training.
    """
    table = with_columns(table, *(f"{training} {column}" for training in TRAININGS for column in ("paper", *BOUNDS)))
    both = [table[[f"{training} {c}" for training in TRAININGS]].notna().all(axis=1) for c in ("paper", "points")]
    linear, stems = table[table["stem"] == "linear"].iloc[0], table[(table["stem"] != "linear") & (both[0] | both[1])]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    colours = sns.color_palette("husl" if len(stems) > 10 else "colorblind", len(stems))
    for i, stem in enumerate(stems["stem"]):
        row = stems[stems["stem"] == stem].select_dtypes("number")
        look = {"color": colours[i], "marker": "os^vDP*Xp"[i % 9], "linestyle": "none"}
        x, y = (row[f"{c} paper"] - linear[f"{c} paper"] for c in TRAININGS)
        axes[0].plot(x, y, label=stem, markerfacecolor="none", **look)
        x, y = (row[f"{c} points"] for c in TRAININGS)
        if x.notna().all() and y.notna().all():
            xerr, yerr = (whiskers(row, f"{c} ") for c in TRAININGS)
            axes[1].errorbar(x, y, xerr=xerr, yerr=yerr, elinewidth=0.8, **look)
    for panel, title in zip(axes, ("the paper, ImageNet", f"here, {name}"), strict=True):
        panel.axhline(0, color="0.2", linewidth=0.8)
        panel.axvline(0, color="0.2", linewidth=0.8)
        panel.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="supervised, minus linear, points", ylabel="pretrained, minus linear, points")
    figure.legend(loc="outside right center", title="stem", fontsize="small")
    return figure


def leak_figure() -> Figure:
    """The leak map: rows train and eval, a column per stem; masked tokens outlined."""
    figure, axes = plt.subplots(2, len(LEAK_ROWS), figsize=(8.4, 4.4), layout="constrained")
    for row, mode in zip(axes, ("train", "eval"), strict=True):
        for panel, stem in zip(row, LEAK_ROWS, strict=True):
            leak, mask = leak_maps()[stem, mode]
            notes = np.where(mask | (leak == 0), "", [[f"{value:.0f}" for value in line] for line in 100 * leak])
            sns.heatmap(
                np.where(mask, np.nan, 100 * leak), ax=panel, vmin=0, vmax=60, cmap="rocket_r", annot=notes, fmt="",
                cbar=False, square=True, xticklabels=False, yticklabels=False, linewidths=0.5, linecolor="0.9",
                annot_kws={"size": 7},
            )  # fmt: skip
            panel.set(facecolor="0.55", title=stem if mode == "train" else "")
        row[0].set_ylabel(mode)
    figure.colorbar(axes[0][0].collections[0], ax=axes, label="change, % of a token's length", shrink=0.8, extend="max")
    return figure


GREY = 0.55  # of what is masked


@functools.cache
def prototypes(data: str, image_size: int, patch_size: int, seed: int) -> tokenizers.PatchTokens:
    """The k-means tokens of the training images."""
    return tokenizers.make_targets("tokens", source(data).open("train", image_size), patch_size, seed)


def masking_figure(p: Profile, count: int = 4) -> Figure:
    """Images, their block-wise masks, and the k-means prototypes of their patches; of `cpu` where none are in memory."""
    p = PROFILES["cpu"] if p.paper else p
    spec = arms_of(small.stems, p)["linear pretrained"].spec.parent.with_seed(p.seeds[0])
    grid, side = spec.model.grid, spec.model.patch_size
    data = source(spec.data).open("train", spec.model.image_size)
    images = channels_last(data.images[:count]) / 255
    masks = torch.from_numpy(masked.block_masks(spec.seed, 0, np.arange(count), grid, spec.masked))
    hidden = channels_last(masked.pixels(masks, grid, side))
    tokens = prototypes(spec.data, spec.model.image_size, side, spec.seed)
    decoded = channels_last(tokens.decode(tokens.tokens[0, :count]))
    rows = {"image": images, f"{spec.masked} of {grid**2} masked": np.where(hidden, GREY, images)}
    return pictures(rows | {"prototypes": decoded}, (1.5 * count, 4.6))


def reconstruction_figure(spec: RunSpec) -> tuple[Figure, str]:
    """A finished tokenizer: held-out images, one of each class, above what their tokens give back; and a caption.

    Raises UsageError for a run that is not finished, has no weights here or reads its images from files.
    """
    data = source(spec.data).open(spec.split, spec.model.image_size)
    images = data.normalise(data.images[one_of_each(data)])
    with torch.no_grad():
        rows = {"image": images, "decoded": execute.trained_tokenizer(spec)(images)}
    pixels = {name: channels_last((batch * data.std + data.mean).clamp(0, 1)) for name, batch in rows.items()}
    return pictures(pixels, (0.8 * len(images), 1.8)), (
        f"{title_of(spec.data)}, {spec.split} images, one of each class, at {spec.model.image_size} pixels, and "
        f"what the discrete VAE of seed {spec.seed} gives back from {spec.model.grid**2} tokens an image, of "
        f"{spec.model.vocabulary} that there are. The table has all {len(data):,} images."
    )
