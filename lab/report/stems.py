"""Table 7 and Figures 5 and 6: stems, what they leak of masked patches, and what masked pre-training predicts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from lab.claims import exact
from lab.claims.statistics import prints_as
from lab.data.registry import card, load_resized
from lab.experiments.catalogue import Runs, experiment
from lab.experiments.profiles import profile
from lab.experiments.small import STEM_ARMS, stem_model
from lab.report.accuracy import committed_values, contrast, correct, points, top1
from lab.report.printed import paper_stem, paper_stems, printed_stem
from lab.report.tables import NOT_RUN
from lab.runs import execute, store
from lab.runs.spec import RunSpec
from vitlib.data import normalise
from vitlib.errors import UsageError
from vitlib.model import ViTConfig
from vitlib.train import masked, tokenizers


def stem_sizes(profile_name: str | None = None) -> pd.DataFrame:
    """The rows of Table 7 at ViT-B's size, counted, and as printed; with a profile, the share at its size too."""
    rows = []
    for name in STEM_ARMS:
        config, printed = paper_stem(name), printed_stem(name)["gflops"]
        size = exact.size(config)
        apart = size.macs / 1e9 / float(printed) - 1
        row = {
            "stem": name, "model": f"B{config.depth}", "norm": config.norm, "act": config.act,
            "params": f"{size.params:,}", "gmacs": f"{size.macs / 1e9:.3f}", "paper, GFLOPs": printed,
            "ours minus paper": "as printed" if prints_as(size.macs / 1e9, printed) else f"{100 * apart:+.2f} %",
            "more than linear": _more(config, paper_stem("linear")),
        }  # fmt: skip
        if profile_name is not None:
            small, base = (stem_model(profile(profile_name), stem) for stem in (name, "linear"))
            row[f"more than linear, {base.name}"] = _more(small, base)
        rows.append(row)
    return pd.DataFrame(rows)


def _more(config: ViTConfig, base: ViTConfig) -> str:
    return f"{100 * (exact.size(config).macs / exact.size(base).macs - 1):+.2f} %"


def table7(arm_runs: Runs) -> pd.DataFrame:
    """In Table 7's form: a row a stem, accuracies and differences to the linear stem with the same training.

    Where a stem was not run here stands the committed reference, labelled "study", if there is one.
    """
    paper, committed, rows = paper_stems(), committed_values(arm_runs.experiment.notebook), []
    for stem in STEM_ARMS:
        row = {"stem": stem}
        for training in ("supervised", "scratch", "pretrained"):
            arm, linear = f"{stem} {training}", f"linear {training}"
            here, known = arm in arm_runs.results, f"study: {committed.get(arm, NOT_RUN)}"
            if arm in paper:
                row[f"top1 {training}, paper"] = paper[arm]
            row[f"top1 {training}"] = top1(arm_runs.results[arm]) if here else known if arm in committed else "–"
            if len(arm_runs.experiment.profile.seeds) > 1:
                apart = here and stem != "linear"
                row[f"{training} minus linear, points"] = points(contrast(arm_runs, arm, linear) if apart else None)
        rows.append(row)
    return pd.DataFrame(rows)


def trainings(arm_runs: Runs) -> pd.DataFrame:
    """The two primary stems under each training: labels, pre-training, its tokens, layer decay."""
    seen, rows = arm_runs.results, []
    names = ["supervised", "scratch", "pretrained", "pretrained k-means", "pretrained dvae", "pretrained decay"]
    for training in names:
        linear, hmlp = f"linear {training}", f"hmlp {training}"
        if linear not in seen:
            continue
        parent = arm_runs.experiment.arms[linear].parent
        row = {"training": training, "predicts": TARGETS[parent.targets] if parent else "–"}
        row |= {f"top1 {arm.split()[0]}": top1(seen[arm]) if arm in seen else "–" for arm in (linear, hmlp)}
        if len(arm_runs.experiment.profile.seeds) > 1:
            row["hmlp minus linear, points"] = points(contrast(arm_runs, hmlp, linear) if hmlp in seen else None)
        rows.append(row)
    return pd.DataFrame(rows)


TARGETS = {"tokens": "k-means tokens", "dvae": "dVAE tokens", "pixels": "pixels"}


def stem_figure(arm_runs: Runs) -> Figure:
    """Figure 6's form, in points above the linear stem: across with labels alone, up after masked pre-training.

    One point a stem, with its 95 % intervals over seeds and images. First the paper's own Table 7, on axes of its own;
    then all labels; then the few labels that fine-tuning has. Above the diagonal a stem gains more by pre-training.
    """
    seen = correct(arm_runs)
    stems = [stem for stem in STEM_ARMS if stem != "linear"]
    across = [c for c in ("supervised", "scratch") if {f"linear {c}", "linear pretrained"} <= seen.keys()]
    size = (3 * (1 + len(across)) + 1.4, 3.4)
    figure, (axes,) = plt.subplots(1, 1 + len(across), figsize=size, layout="constrained", squeeze=False)
    paper = {arm: float(value) for arm, value in paper_stems().items()}
    for colour, marker, stem in zip(sns.color_palette("colorblind", len(stems)), "os^vDP*Xp", stems, strict=True):
        look = {"color": colour, "marker": marker, "linestyle": "none"}
        x, y = (paper[f"{stem} {c}"] - paper[f"linear {c}"] for c in ("supervised", "pretrained"))
        axes[0].plot(x, y, label=stem, **look)
        for cell, training in zip(axes[1:], across, strict=True):
            if {f"{stem} {training}", f"{stem} pretrained"} <= seen.keys():
                (x, left, right), (y, down, up) = (_gap(arm_runs, stem, c) for c in (training, "pretrained"))
                cell.errorbar(x, y, xerr=[[left], [right]], yerr=[[down], [up]], elinewidth=0.8, **look)
    titles = {"supervised": "all labels", "scratch": "the same few labels"}
    for cell, name in zip(axes, ("supervised", *across), strict=True):
        cell.axhline(0, color="0.2", linewidth=0.8)
        cell.axvline(0, color="0.2", linewidth=0.8)
        cell.axline((0, 0), slope=1, color="0.6", linewidth=0.8, linestyle=":")
        ours = f"{arm_runs.experiment.profile.name}, {titles[name]}"
        cell.set(title="paper, ImageNet" if cell is axes[0] else ours)
        cell.set(xlabel=f"{name}, minus linear, points", ylabel="pretrained, minus linear, points")
    figure.legend(loc="outside right center", title="stem", fontsize="small")
    return figure


def _gap(arm_runs: Runs, stem: str, training: str) -> tuple[float, float, float]:
    """A stem minus the linear one, points, and how far its interval reaches down and up (0 with one seed)."""
    a, b = (arm_runs.results[f"{name} {training}"] for name in (stem, "linear"))
    mean = float(np.mean([x.metrics["top1"] - y.metrics["top1"] for x, y in zip(a, b, strict=True)]))
    estimate = contrast(arm_runs, f"{stem} {training}", f"linear {training}")
    return (mean, 0.0, 0.0) if estimate is None else (mean, mean - estimate.low, estimate.high - mean)


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
    for name, stem in LEAK_ROWS.items():
        for mode in ("train", "eval"):
            leak = exact.leak_map(stem, training=mode == "train").numpy()
            maps[name, mode] = leak.reshape(2 * (round(len(leak) ** 0.5),))
    return maps


def leak_table() -> pd.DataFrame:
    """Change of tokens when masked pixels change: the nearest visible tokens, all visible ones, the masked ones."""
    rows = []
    for (stem, mode), leak in leak_maps().items():
        mask = exact.block_mask(len(leak)).numpy().reshape(leak.shape)
        visible = leak[~mask]
        rows.append({
            "stem": stem, "mode": mode, "visible tokens that move": f"{(visible > 0).sum()} of {visible.size}",
            "largest change of a visible token": "0" if visible.max() == 0 else f"{100 * visible.max():.1f} %",
            "mean change of a masked token": f"{100 * leak[mask].mean():.0f} %",
        })  # fmt: skip
    return pd.DataFrame(rows)


def leak_figure() -> Figure:
    """The leak map: rows train and eval, a column a stem; masked tokens outlined."""
    maps, stems = leak_maps(), list(LEAK_ROWS)
    figure, axes = plt.subplots(2, len(stems), figsize=(8.4, 4.4), layout="constrained")
    for (row, mode), (column, stem) in ((a, b) for a in enumerate(("train", "eval")) for b in enumerate(stems)):
        leak, cell = maps[stem, mode], axes[row][column]
        mask = exact.block_mask(len(leak)).numpy().reshape(leak.shape)
        visible = np.where(mask, np.nan, 100 * leak)
        notes = np.where(mask | (leak == 0), "", [[f"{value:.0f}" for value in line] for line in 100 * leak])
        sns.heatmap(
            visible, ax=cell, vmin=0, vmax=60, cmap="rocket_r", annot=notes, fmt="", cbar=False, square=True,
            xticklabels=False, yticklabels=False, linewidths=0.5, linecolor="0.9", annot_kws={"size": 7},
        )  # fmt: skip
        cell.set_facecolor("0.55")
        cell.set_title(stem if row == 0 else "")
        cell.set_ylabel(mode if column == 0 else "")
    figure.colorbar(axes[0][0].collections[0], ax=axes, label="change, % of a token's length", shrink=0.8, extend="max")
    return figure


def masking_figure(profile_name: str, count: int = 4) -> Figure:
    """Images, their block-wise masks, and the k-means prototypes of their patches; of `cpu` where none are in memory."""
    p = profile(profile_name)
    p = profile("cpu") if p.paper else p
    spec = experiment("52", p.name).arms["linear pretrained"].parent.with_seed(p.seeds[0])
    data = load_resized(p.data, "train", p.image_size)
    tokens = tokenizers.make_targets("tokens", data, p.patch_size, spec.seed)
    grid, side, channels = spec.model.grid, p.patch_size, spec.model.in_chans
    masks = masked.block_masks(spec.seed, 0, np.arange(count), grid, spec.masked)
    figure, axes = plt.subplots(3, count, figsize=(1.5 * count, 4.6), layout="constrained")
    for i in range(count):
        image = data.images[i].permute(1, 2, 0).numpy() / 255
        mask = np.kron(masks[i].reshape(grid, grid), np.ones((side, side), dtype=bool))[..., None]
        pieces = tokens.prototypes[tokens.tokens[0, i]].reshape(grid, grid, channels, side, side)
        predicted = pieces.permute(0, 3, 1, 4, 2).reshape(grid * side, grid * side, channels).numpy()
        for row, picture in enumerate((image, np.where(mask, GREY, image), predicted)):
            axes[row][i].imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes[row][i].set(xticks=[], yticks=[])
            axes[row][i].grid(False)
    for row, name in enumerate(("image", f"{spec.masked} of {grid**2} masked", "prototypes")):
        axes[row][0].set_ylabel(name)
    return figure


GREY = 0.55  # of what is masked


def tokenizers_of(arm_runs: Runs) -> list[RunSpec]:
    """The tokenizers that these runs had trained, one a seed; none where they predict k-means tokens or pixels."""
    family = (member for spec in arm_runs.experiment.specs() for member in spec.family())
    return [m for m in dict.fromkeys(family) if m.protocol == "tokenizer" and store.find(m) is not None]


def codebook_use(specs: Sequence[RunSpec]) -> pd.DataFrame:
    """One row a finished tokenizer: how well it reconstructs held-out images, and how much of its codebook is in use."""
    rows = []
    for spec in specs:
        use, V = store.find(spec).metrics, spec.model.vocabulary
        rows.append({
            "tokenizer": spec.model.name, "seed": spec.seed, f"tokens used, of {V}": f"{use['tokens_used'] * V:.0f}",
            "perplexity": f"{use['perplexity']:.1f}", "error, of 255 grey levels": f"{255 * use['recon_mse'] ** 0.5:.1f}",
            "first_loss": f"{use['first_loss']:.5f}", "train_loss": f"{use['train_loss']:.3f}",
        })  # fmt: skip
    return pd.DataFrame(rows).astype(str)


def reconstruction_figure(spec: RunSpec) -> tuple[Figure, str]:
    """A finished tokenizer: held-out images, one of each class, above what their tokens give back; and a caption.

    Raises UsageError for a run that is not finished or has no weights here.
    """
    if spec.streamed:
        raise UsageError(f"{spec.data} is read from its files: reconstructions are shown of images in memory")
    data = load_resized(spec.data, spec.split, spec.model.image_size)
    images = normalise(data.images[np.unique(data.labels.numpy(), return_index=True)[1]], data)
    model = execute.trained_tokenizer(spec)
    with torch.no_grad():
        rows = {"image": images, "decoded": model(images)}
    figure, axes = plt.subplots(2, len(images), figsize=(0.8 * len(images), 1.8), layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        pixels = (pictures * data.std + data.mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for cell, picture in zip(line, pixels, strict=True):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
        line[0].set_ylabel(name)
    caption = (
        f"{card(spec.data)['pretty_name']}, {spec.split} images, one of each class, at {spec.model.image_size} pixels, and "
        f"what the discrete VAE of seed {spec.seed} gives back from {spec.model.grid**2} tokens an image, of "
        f"{spec.model.vocabulary} that there are. The table has all {len(data):,} images."
    )
    return figure, caption
