"""`python -m vitlib predict` and `evaluate`: what a fine-tuned model says of images, and how often it is right."""

from __future__ import annotations

import csv as tables
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from vitlib.data import DataSet, Found
from vitlib.data.read import Files, images_in, text
from vitlib.errors import UsageError, need
from vitlib.files import check_target, intact, write_figure, write_table
from vitlib.stats import wilson
from vitlib.tasks.images import read_images, read_test
from vitlib.tasks.runs import say
from vitlib.tasks.trunk import Trunk, read_trunk
from vitlib.train.engine import resolve


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of N images among K classes."""

    names: tuple[str, ...]
    classes: tuple[str, ...]
    shares: np.ndarray  # softmax of the logits, (N, K)

    def rows(self) -> list[tuple[str, str, str]]:
        """Path, class and its share."""
        best = self.shares.argmax(axis=1)
        return [(n, self.classes[k], f"{s[k]:.4f}") for n, k, s in zip(self.names, best, self.shares, strict=True)]

    def __str__(self) -> str:
        return "\n".join(map("\t".join, self.rows()))


def predict(
    model: Path | str, paths: Sequence[Path | str] | Path | str, csv: Path | str | None = None, device: str = "auto"
) -> Predictions:
    """The class of each image; folders are searched for images. `csv`: a file with path, class and its softmax share.

    Raises UsageError for a model without class names, and for images that are not there or cannot be read.
    """
    if csv is not None:
        check_target(csv, (".csv",))
    tuned, device = classifier(model), resolve(device)
    several = [paths] if isinstance(paths, (str, Path)) else paths
    names = [name for path in map(Path, several) for name in image_names(path)]
    if not names:
        raise UsageError("there is no image to look at: allowed are images and folders of images")
    files = Files(Path(), pa.array(map(os.fsencode, names), pa.binary()), np.arange(len(names)))
    data, _, notes = read_images(Found(files, np.zeros(len(names), int), tuned.classes), tuned.seen, "images")
    for note in notes:
        say(f"note: {note}")
    predictions = Predictions(tuple(map(text, names)), tuned.classes, shares_of(tuned, data, device))
    if csv is not None:
        write_table(csv, [("path", "class", "share"), *predictions.rows()])
    return predictions


def image_names(path: Path) -> list[str]:
    """A file, or every image below a folder."""
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}")
    names = [str(path / name) for name in images_in(path)] if path.is_dir() else [str(path)]
    if not names:
        raise UsageError(f"folder {path} holds no image")
    return names


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier on labelled images: `confusion` counts images by (their class, what was said), (K, K)."""

    classes: tuple[str, ...]
    confusion: np.ndarray
    left_out: int  # images that the model was trained or chosen on

    @property
    def top1(self) -> float:
        return 100 * float(self.confusion.trace() / self.confusion.sum())

    def __str__(self) -> str:
        right, images, wide = int(self.confusion.trace()), int(self.confusion.sum()), max(map(len, self.classes))
        low, high = wilson(right, images)
        lines = [f"top-1 {self.top1:.1f} % (95 % over {images} images: {low:.1f} to {high:.1f})"]
        if self.left_out:
            lines.append(f"{self.left_out} images are left out, since the model was trained or chosen on them")
        for name, own, count in zip(self.classes, self.confusion.diagonal(), self.confusion.sum(axis=1), strict=True):
            lines.append(f"  {name:{wide}}  " + (f"{100 * own / count:5.1f} % of {count}" if count else "no image"))
        return "\n".join(lines)

    def draw(self, path: Path | str) -> None:
        """The confusion matrix as a picture."""
        from matplotlib.figure import Figure

        side = max(3.0, 1.5 + 0.35 * len(self.classes))
        figure = Figure(figsize=(side, side), layout="constrained")
        axes, share = figure.subplots(), self.confusion / np.maximum(self.confusion.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if len(self.classes) <= 30:
            for (i, k), count in np.ndenumerate(self.confusion):
                axes.text(k, i, count or "", ha="center", va="center", color="white" if share[i, k] > 0.5 else "black")
        axes.set(xlabel="predicted", ylabel="labelled", title=f"top-1 {self.top1:.1f} %")
        axes.set_xticks(range(len(self.classes)), self.classes, rotation=90)
        axes.set_yticks(range(len(self.classes)), self.classes)
        write_figure(path, figure, dpi=100)


def evaluate(
    model: Path | str, folder: Path | str, labels: Path | str | None = None, picture: Path | str | None = None,
    device: str = "auto",
) -> Evaluation:  # fmt: skip
    """How often a model is right on a folder: of one with parts, on its test part.

    Images that are in the model's training and validation parts (`split.csv` beside it) are left out. Raises UsageError
    where the folder has classes that the model has not.
    """
    device = resolve(device)
    if picture is not None:
        check_target(picture, (".png", ".svg", ".pdf"))
        need("matplotlib", "own")
    tuned = classifier(model)
    data, digests = read_test(folder, tuned.seen, labels)
    if other := sorted(set(data.classes) - set(tuned.classes)):
        there = f"{len(other)} classes that the model has not, the first is {other[0]}"
        raise UsageError(f"{folder} has {there}: it knows {', '.join(tuned.classes)}")
    seen = seen_by(model)
    fresh = np.flatnonzero([digest not in seen for digest in digests])
    if not len(fresh):
        raise UsageError(f"the model was trained or chosen on every image of {folder}: give others")
    data = data.take(fresh)
    said = shares_of(tuned, data, device).argmax(axis=1)
    truth = np.array([tuned.classes.index(name) for name in data.classes])[data.labels.numpy()]
    confusion = np.zeros((len(tuned.classes),) * 2, int)
    np.add.at(confusion, (truth, said), 1)
    result = Evaluation(tuned.classes, confusion, len(digests) - len(fresh))
    if picture is not None:
        result.draw(picture)
    return result


def classifier(model: Path | str) -> Trunk:
    """A fine-tuned model with its classes."""
    tuned = read_trunk(model)
    if not tuned.classes or len(tuned.classes) != tuned.model.config.num_classes:
        raise UsageError(f"{model} names no classes: allowed is a model that `python -m vitlib finetune` wrote")
    return tuned


def seen_by(model: Path | str) -> set[str]:
    """Digests of the images that a model was trained or chosen on, as the split beside it says."""
    split = (Path(model) if Path(model).is_dir() else Path(model).parent) / "split.csv"
    if not split.is_file():
        return set()
    with intact(split), split.open(newline="", encoding="utf-8") as file:
        seen = {line["content"] for line in tables.DictReader(file) if line["part"] != "test"}
        if not seen or None in seen:
            raise ValueError
    return seen


@torch.no_grad()
def shares_of(tuned: Trunk, data: DataSet, device: str) -> np.ndarray:
    """Softmax of the logits of each image, (N, K)."""
    model = tuned.model.to(device)
    logits = [model(batch.to(device).images).float().cpu() for batch in data.evaluation_batches(100)]
    if not (shares := torch.cat(logits).softmax(dim=1)).isfinite().all():
        raise UsageError(f"what {tuned.source} says of these images is not finite: its weights cannot be right")
    return shares.numpy()
