"""Data sets by name: the card says what the data must be, the loader refuses anything else.

A card (data_cards/<name>.md, Hugging Face dataset-card form) carries under `vitlib:` the files, the channels, the
pixel statistics and, per split, the SHA-256 over the decoded arrays, so that a file that was re-encoded without loss
passes and one changed pixel does not. A card may be a view of another one's images: `view_of` and `classes` instead of
files. A card whose block has no `embedded: true` is read from a folder or the Hub (`external.py`); what must be known of it
before a run is measured once and kept. A card without that block describes data that no run can name.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, UnidentifiedImageError

from lab import paths
from lab.data import external, readers
from lab.paths import DATA_CARDS, EMBEDDED
from vitlib.data.memory import DataSet, resize
from vitlib.errors import UsageError, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Facts:
    """What a run must know of a data set before it reads an image."""

    channels: int
    num_classes: int
    image_size: int
    mean: float
    std: float
    sizes: dict[str, int]  # split -> images
    sha256: dict[str, str]  # split -> checksum of the decoded arrays; empty for what is read from its files


def checksum(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 over the decoded arrays: uint8 (N, C, H, W), then little-endian int64 (N,)."""
    digest = hashlib.sha256(repr((images.shape, labels.shape)).encode())
    digest.update(np.ascontiguousarray(images, np.uint8).data)
    digest.update(np.ascontiguousarray(labels, "<i8").data)
    return digest.hexdigest()


def names() -> list[str]:
    """Every embedded data set. Runs can also name those whose card says how they are read from elsewhere."""
    return sorted(path.stem for path in DATA_CARDS.glob("*.md") if "sha256" in read_card(path).get("vitlib", {}))


def card(name: str) -> dict:
    """The YAML part of a data card. Raises UsageError for a data set without one, or that no run can name."""
    path = DATA_CARDS / f"{name}.md"
    if path not in DATA_CARDS.glob("*.md"):
        raise unknown("data set", name, names())
    about = read_card(path)
    if "vitlib" not in about:
        raise UsageError(
            f"data set {name!r} has a card but no run can name it: data_cards/{name}.md says where to get it"
        )
    return about


def read_card(path: Path) -> dict:
    """The YAML between the first two lines of dashes, whatever the card is for. Not to be changed: it is read once."""
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, modified: int) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def facts(name: str) -> Facts:
    """From the card of an embedded data set; of another one measured, once, and kept in outputs/data.

    Raises external.DataAbsent where the data is not to be found.
    """
    about = card(name)
    if "from_files" in about["vitlib"]:
        raise UsageError(f"data set {name!r} is read from its files as they are needed: no run holds it in memory")
    if "sha256" not in about["vitlib"]:
        return _measured(name, str(readers.data_root()), str(paths.outputs()))
    known = {key: about["vitlib"][key] for key in ("channels", "num_classes", "image_size", "mean", "std", "sha256")}
    sizes = {split["name"]: split["num_examples"] for split in about["dataset_info"]["splits"]}
    return Facts(**known, sizes=sizes)


@functools.lru_cache(maxsize=16)
def _measured(name: str, root: str, outputs: str) -> Facts:
    """Decodes every image at the first call; later ones, also of other processes, read what was kept."""
    about = card(name)
    key = external.signature(name, about)
    kept = Path(outputs) / "data" / f"{name}-{key}.json"
    if kept.is_file():
        return Facts(**json.loads(kept.read_text(encoding="utf-8")))
    found = external.arrays(name, key)
    images, _, classes = found["train"]
    levels = np.arange(256) / 255
    counts = np.bincount(images.ravel(), minlength=256)
    mean = float((counts * levels).sum() / counts.sum())
    std = float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))
    measured = Facts(
        images.shape[1], len(classes), images.shape[-1], round(mean, 5), round(std, 5),
        {split: len(labels) for split, (_, labels, _) in found.items()},
        {split: checksum(images, labels) for split, (images, labels, _) in found.items()},
    )  # fmt: skip
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_name(f".{kept.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(measured)), encoding="utf-8")
    draft.replace(kept)
    return measured


def published(name: str) -> Facts:
    """Of a data set of the paper that is read from its files as it is needed: classes and sizes of Table 9, on every machine.

    Opening it compares the files with them. Raises UsageError for data that the paper does not use.
    """
    card(name)
    splits = {split: readers.expected(name, split) for split in ("train", "test")}
    if None in splits.values():
        raise unknown("data set of the paper", name, readers.PUBLISHED)
    sizes, classes = {split: max(counts) for split, (counts, _) in splits.items()}, splits["train"][1]
    return Facts(3, classes, image_size=0, mean=0.0, std=1.0, sizes=sizes, sha256={})


def data_checksum(name: str, from_files: bool = False) -> str:
    """What a run's hash holds of its data: a checksum over pixels and labels.

    from_files: over name, classes and sizes of what was published, so that a run has one name on every machine, with the data
    or without it; its result says which files it read.
    """
    if from_files:
        known = published(name)
        identity = json.dumps([name, known.num_classes, known.sizes], sort_keys=True)
    else:
        identity = "".join(facts(name).sha256[split] for split in SPLITS)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def load(name: str, split: str) -> DataSet:
    """A split, decoded once a process and held as one uint8 tensor.

    Raises UsageError for a name or a split that does not exist, and for a file that is missing, damaged, or decodes to
    something other than its card says.
    """
    about = card(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    own, known = about["vitlib"], facts(name)
    if "sha256" not in own:
        images, labels, classes = external.arrays(name, external.signature(name, about))[split]
        return DataSet(
            name, split, torch.from_numpy(images), torch.from_numpy(labels), tuple(classes), known.mean, known.std,
            data_checksum(name),
        )  # fmt: skip
    images, labels = _view(own, split) if "view_of" in own else read_parquet(EMBEDDED / own["files"][split])
    found, wanted = checksum(images, labels), known.sha256[split]
    if found != wanted:
        source = own.get("view_of") or own["files"][split]
        raise UsageError(
            f"{source} does not hold the {split} images of {name}: its decoded arrays have SHA-256 {found[:16]}..., "
            f"data_cards/{name}.md says {wanted[:16]}...; take the file from a fresh clone"
        )
    return DataSet(
        name, split, torch.from_numpy(images), torch.from_numpy(labels),
        tuple(class_names(about)), known.mean, known.std, data_checksum(name),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def load_resized(name: str, split: str, size: int) -> DataSet:
    """`load`, then `resize`, once a process."""
    data = load(name, split)
    return replace(data, images=resize(data.images, size))


def class_names(about: dict) -> list[str]:
    """The classes of a card, in the order of their labels."""
    features = {f["name"]: f for f in about["dataset_info"]["features"]}
    named = features["label"]["dtype"]["class_label"]["names"]
    return [named[key] for key in sorted(named, key=int)]


def _view(facts: dict, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The parent's images of `classes` (its labels, ascending) in its order, labels numbered anew from 0."""
    parent = load(facts["view_of"], split)
    labels = parent.labels.numpy()
    kept = np.isin(labels, facts["classes"])
    return parent.images.numpy()[kept], np.searchsorted(facts["classes"], labels[kept])


def read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one parquet file in the Hugging Face layout: uint8 (N, C, H, W) and int64 (N,).

    Raises UsageError for a missing or damaged file and for images of different sizes.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path.name} in {path.parent}: take it from a fresh clone of the project")
    try:
        table = pq.read_table(path, columns=["image", "label"])
        cells = pc.struct_field(table["image"].combine_chunks(), "bytes")
        decoded = [_pixels(cell.as_buffer()) for cell in cells]
        images = np.stack(decoded)
    except (pa.ArrowException, OSError, UnidentifiedImageError, KeyError, ValueError, SyntaxError) as fault:
        raise UsageError(
            f"{path.name} is damaged and cannot be read ({type(fault).__name__}): take it from a fresh clone"
        ) from fault
    return images, table["label"].to_numpy().astype(np.int64)


def _pixels(encoded: pa.Buffer) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(encoded)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
