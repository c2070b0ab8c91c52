"""Data sets by name or folder: the card says what the data must be, the loader refuses anything else.

A card (data_cards/<name>.md, Hugging Face dataset-card form) says under `vitlib:` how its images are had:

    files, sha256      embedded: lossless images, with the SHA-256 over the decoded arrays, so that a file which was
                       re-encoded without loss passes and one changed pixel does not
    view_of, classes   another card's images of these classes
    folders, hub       in a folder of $VITLIB_DATA, or on the Hub; held in memory, and measured once
    streamed, sizes    the paper's data sets, of these sizes; opened image by image (`published.py`)
    splits             what a folder, or the Hub, calls the training images and those that are tested on

Anything else is a folder of one's own, without an entry anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lab import paths
from lab.data import published
from lab.data.published import read_card as read_card
from lab.paths import DATA_CARDS, EMBEDDED
from vitlib.data import Augment, DataSet, Found, InMemory, Streamed, held_out, open_folder, resize
from vitlib.data.read import decode, read_parquet, read_split
from vitlib.errors import UsageError, unknown
from vitlib.files import intact, write_whole

SPLITS = ("train", "validation", "test")
COLOURS = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # of photographs, as pretrained models want them


@dataclass(frozen=True)
class Facts:
    """What a run must know of a data set before it reads an image."""

    channels: int
    num_classes: int
    image_size: int  # 0 = images of many sizes
    mean: tuple[float, ...]  # per channel, of pixels / 255
    std: tuple[float, ...]
    sizes: dict[str, int]  # split -> images
    sha256: dict[str, str] = field(default_factory=dict)  # split -> checksum of the decoded arrays, where they are held

    @property
    def checksum(self) -> str:
        """Of all arrays."""
        return _digest(self.sha256[split] for split in SPLITS)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that a run can name. `checksum` is what the run's hash holds of it."""

    name: str
    facts: Facts
    checksum: str
    opener: Callable[[str, int, Augment, int], DataSet]
    second_test: str | None = None  # a data set of other test images of the same classes

    def open(
        self, split: str, image_size: int, augment: Augment | None = None, workers: int = 0, num_classes: int | None = None
    ) -> DataSet:  # fmt: skip
        """A split at the size that the model reads; `num_classes` is what the model has. As `vitlib.data.open_folder`."""
        data = self.opener(split, image_size, augment or Augment(), workers)
        if num_classes not in (None, len(data.classes)):
            raise UsageError(f"{self.name} {split} has {len(data.classes)} classes, {num_classes} are expected")
        return data


def source(name: str | Path, streamed: bool = False) -> Source:
    """A data set by the name of its card, or by the path of a folder.

    streamed: images are opened one by one and augmented, where the card leaves the choice or the folder is small.

    Raises UsageError for a name without a card, and DataAbsent for data that must be measured and is not here.
    """
    if isinstance(name, Path) or os.sep in name:
        return _folder(Path(name), streamed)
    if streamed or card(name)["vitlib"].get("streamed"):
        return _published(name)
    known = facts(name)
    return Source(name, known, known.checksum, lambda split, size, *_: load_resized(name, split, size))


def _published(name: str) -> Source:
    """The paper's data sets have the sizes and the checksum of what was published, so that a run has one name on every
    machine, with the data or without it; its result says which files it read.
    """
    own = card(name)["vitlib"]
    if "sizes" not in own:
        of_paper = [path.stem for path in DATA_CARDS.glob("*.md") if "sizes" in read_card(path)["vitlib"]]
        raise unknown("data set of the paper", name, sorted(of_paper))
    with intact(DATA_CARDS / f"{name}.md"):
        sizes, classes = {split: max(counts) for split, counts in own["sizes"].items()}, int(own["num_classes"])
    return Source(
        name, Facts(3, classes, 0, *COLOURS, sizes), _digest([json.dumps([name, classes, sizes], sort_keys=True)]),
        lambda split, size, *how: Streamed(name, split, published.read_published(name, own, split), size, *how),
        own.get("second_test"),
    )  # fmt: skip


def _folder(folder: Path, streamed: bool) -> Source:
    """A folder of one's own: its identity is the names, sizes and labels of its images."""
    found = {split: read_split(folder, split) for split in SPLITS}
    sizes, classes = {split: len(part.labels) for split, part in found.items()}, len(found["train"].classes)
    how = {"streamed": streamed or None}
    return Source(
        str(folder), Facts(3, classes, 0, *COLOURS, sizes), _digest(part.checksum() for part in found.values()),
        lambda split, size, augment, workers: open_folder(folder, split, size, augment=augment, workers=workers, **how),
    )  # fmt: skip


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- cards


def names() -> list[str]:
    """Every embedded data set. Runs can also name the others that have a card, and folders."""
    return sorted(path.stem for path in DATA_CARDS.glob("*.md") if "sha256" in read_card(path).get("vitlib", {}))


def card(name: str) -> dict:
    """The YAML part of a data card. Raises UsageError for a data set without one."""
    path = DATA_CARDS / f"{name}.md"
    if path not in DATA_CARDS.glob("*.md"):
        raise unknown("data set", name, names())
    return read_card(path)


def title_of(name: str) -> str:
    """What a page calls a data set: its card's `pretty_name`, or the folder's name."""
    return Path(name).name if os.sep in name else card(name)["pretty_name"]


def class_names(about: dict) -> list[str]:
    """The classes of a card, in the order of their labels."""
    features = {f["name"]: f for f in about["dataset_info"]["features"]}
    named = features["label"]["dtype"]["class_label"]["names"]
    return [named[key] for key in sorted(named, key=int)]


def facts(name: str) -> Facts:
    """Of a data set that is held in memory: from its card; or measured, once, and kept in outputs/data."""
    about = card(name)
    own = about["vitlib"]
    if own.get("streamed"):
        raise UsageError(f"data set {name!r} is read from its files as they are needed: no run holds it in memory")
    if "sha256" not in own:
        return _measured(name, _signature(name), str(paths.outputs()))
    with intact(DATA_CARDS / f"{name}.md"):
        sizes = {split["name"]: int(split["num_examples"]) for split in about["dataset_info"]["splits"]}
        channels, classes, size = (int(own[key]) for key in ("channels", "num_classes", "image_size"))
        mean, std = ((float(own[key]),) * channels for key in ("mean", "std"))
        return Facts(channels, classes, size, mean, std, sizes, {split: own["sha256"][split] for split in SPLITS})


# ------------------------------------------------------------------------------------------------- held in memory


def load(name: str, split: str) -> InMemory:
    """A split at its own size, decoded once per process and held as one uint8 tensor.

    Raises UsageError for a name or a split that does not exist, and for a file that is missing, damaged, or decodes to
    something other than its card says.
    """
    known = facts(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    images, labels, classes = _arrays(name, split, _signature(name))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (known.mean, known.std))
    tensors = torch.from_numpy(images), torch.from_numpy(labels)
    return InMemory(name, split, *tensors, classes, mean, std, known.checksum)


def load_resized(name: str, split: str, size: int) -> InMemory:
    """`load`, then `resize`, once per process."""
    return _resized(name, split, size, _signature(name))


@functools.lru_cache(maxsize=8)
def _resized(name: str, split: str, size: int, signature: str) -> InMemory:
    data = load(name, split)
    return replace(data, images=resize(data.images, size))


def _signature(name: str) -> str:
    """What says, without decoding, that a data set is still the same: its card, and its files' names, sizes and times."""
    own = card(name)["vitlib"]
    parent = _signature(own["view_of"]) if "view_of" in own else ""
    files = [os.path.join(EMBEDDED, file) for file in own.get("files", {}).values()]
    if "sha256" not in own and (folder := published.locate(name)):
        files = [os.path.join(base, file) for base, _, names in os.walk(folder, followlinks=True) for file in names]
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in sorted(files) if os.path.exists(path)]
    return _digest([json.dumps([name, parent, stats, own], sort_keys=True, default=str)])


@functools.lru_cache(maxsize=16)  # five sets of three splits
def _arrays(name: str, split: str, signature: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 (N, C, H, W), labels int64 (N,), class names."""
    about = card(name)
    own = about["vitlib"]
    if "view_of" in own:  # the parent's images of `classes` (its labels, ascending) in its order, numbered anew from 0
        parent = load(own["view_of"], split)
        kept = np.isin(parent.labels, own["classes"])
        images, labels = parent.images.numpy()[kept], np.searchsorted(own["classes"], parent.labels.numpy()[kept])
    else:
        found = _found(name, own, split)
        images, labels = _stack(found, name, own["channels"]), found.labels
    if "sha256" not in own:
        return images, labels, found.classes
    if (digest := checksum(images, labels)) != (wanted := own["sha256"][split]):
        raise UsageError(
            f"{own.get('view_of') or own['files'][split]} does not hold the {split} images of {name}: its decoded arrays "
            f"have SHA-256 {digest[:16]}..., data_cards/{name}.md says {wanted[:16]}...; take the file from a fresh clone"
        )
    with intact(DATA_CARDS / f"{name}.md"):
        return images, labels, tuple(class_names(about))


def checksum(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 over the decoded arrays: uint8 (N, C, H, W), then little-endian int64 (N,)."""
    digest = hashlib.sha256(repr((images.shape, labels.shape)).encode())
    digest.update(np.ascontiguousarray(images, np.uint8).data)
    digest.update(np.ascontiguousarray(labels, "<i8").data)
    return digest.hexdigest()


def _found(name: str, own: dict, split: str) -> Found:
    """A split of the embedded files, of a folder in $VITLIB_DATA, or else of the Hub.

    Of the last two, validation images are held out of the training images.
    """
    if "files" in own:
        path = EMBEDDED / own["files"][split]
        if not path.is_file():
            raise UsageError(
                f"there is no file {path.name} in {path.parent}: take it from a fresh clone of the project"
            )
        return read_parquet([path])
    folder, words = published.locate(name), own["splits"]["test" if split == "test" else "train"]
    if folder is None and "hub" not in own:
        raise published.absent(name)
    try:
        found = published.read_any(folder, words) if folder else published.read_hub(own["hub"], words)
    except UsageError as fault:
        raise fault if folder else published.absent(name, f", and {fault}") from None
    if split == "test":
        return found
    held = held_out(found.labels)
    return found.take(np.flatnonzero(held if split == "validation" else ~held))


def _stack(found: Found, name: str, channels: int) -> np.ndarray:
    """Every image of a split, uint8 (N, C, H, W)."""
    pixels = [np.asarray(decode(found.rows, i, "RGB" if channels == 3 else "L")) for i in range(len(found.labels))]
    if len(shapes := {image.shape[:2] for image in pixels}) != 1:
        some = ", ".join(f"{w}x{h}" for h, w in sorted(shapes)[:3])
        raise UsageError(f"the images of {name} have {len(shapes)} sizes ({some}, ...): allowed is one size throughout")
    images = np.stack(pixels)
    # grey: never strides as of channels-last, by which PyTorch would choose other kernels, of other rounding
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if channels == 3 else images[:, None]


@functools.lru_cache(maxsize=16)
def _measured(name: str, signature: str, outputs: str) -> Facts:
    """Decodes every image at the first call; later ones, also of other processes, read what was kept."""
    kept = Path(outputs) / "data" / f"{name}-{signature}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not there, or damaged: measured anew
        known = json.loads(kept.read_text(encoding="utf-8"))
        return Facts(**known | {key: tuple(known[key]) for key in ("mean", "std")})
    parts = {split: _arrays(name, split, signature) for split in SPLITS}
    images, _, classes = parts["train"]
    # an image at a time: bincount takes eight bytes a pixel
    counts, levels = sum(np.bincount(image.ravel(), minlength=256) for image in images), np.arange(256) / 255
    mean = float((counts * levels).sum() / counts.sum())
    std = float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))
    measured = Facts(
        images.shape[1], len(classes), images.shape[-1], *((round(v, 5),) * images.shape[1] for v in (mean, std)),
        {split: len(labels) for split, (_, labels, _) in parts.items()},
        {split: checksum(*part[:2]) for split, part in parts.items()},
    )  # fmt: skip
    with write_whole(kept) as draft:
        draft.write_text(json.dumps(asdict(measured)), encoding="utf-8")
    return measured
