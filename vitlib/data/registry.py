"""Data sets by name: the card says what the data must be, the loader refuses anything else.

A card (data_cards/<name>.md, Hugging Face dataset-card form) carries under `vitlib:` the files, the channels, the
pixel statistics and, per split, the SHA-256 over the decoded arrays, so that a file that was re-encoded without loss
passes and one changed pixel does not. A card may be a view of another one's images: `view_of` and `classes` instead of
files. A card without that block describes data that is not embedded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitlib.errors import UsageError, unknown
from vitlib.paths import DATA_CARDS, EMBEDDED, ROOT

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSet:
    """One split in memory. `images` uint8 (N, C, H, W), `labels` int64 (N,)."""

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: float  # of the training split's pixels / 255
    std: float
    checksum: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray | Tensor) -> DataSet:
        """The same data set with these images only, in this order."""
        index = torch.as_tensor(index)
        return replace(self, images=self.images[index], labels=self.labels[index])


def checksum(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 over the decoded arrays: uint8 (N, C, H, W), then little-endian int64 (N,)."""
    digest = hashlib.sha256(repr((images.shape, labels.shape)).encode())
    digest.update(np.ascontiguousarray(images, np.uint8).data)
    digest.update(np.ascontiguousarray(labels, "<i8").data)
    return digest.hexdigest()


def names() -> list[str]:
    """Every data set that a run can name: its card has a `vitlib:` block. Other cards only say where data is."""
    return sorted(path.stem for path in DATA_CARDS.glob("*.md") if "vitlib" in read_card(path))


def card(name: str) -> dict:
    """The YAML part of a data card. Raises UsageError for a data set without one, or that cannot be loaded here."""
    path = DATA_CARDS / f"{name}.md"
    if path not in DATA_CARDS.glob("*.md"):
        raise unknown("data set", name, names())
    about = read_card(path)
    if "vitlib" not in about:
        raise UsageError(f"data set {name!r} has a card but is not embedded: data_cards/{name}.md says where to get it")
    return about


def read_card(path: Path) -> dict:
    """The YAML between the first two lines of dashes, whatever the card is for. Not to be changed: it is read once."""
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _parsed(path: Path, modified: int) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def data_checksum(name: str) -> str:
    """One checksum for a data set, from its card: what a run's hash holds. Reads no image."""
    sums = card(name)["vitlib"]["sha256"]
    return hashlib.sha256("".join(sums[split] for split in SPLITS).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def load(name: str, split: str) -> DataSet:
    """A split, decoded once a process and held as one uint8 tensor.

    Raises UsageError for a name or a split that does not exist, and for a file that is missing, damaged, or decodes to
    something other than its card says.
    """
    about = card(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    facts = about["vitlib"]
    images, labels = _view(facts, split) if "view_of" in facts else read_parquet(_file(name, facts, split))
    found, wanted = checksum(images, labels), facts["sha256"][split]
    if found != wanted:
        source = facts.get("view_of") or facts["files"][split]
        raise UsageError(
            f"{source} does not hold the {split} images of {name}: its decoded arrays have SHA-256 {found[:16]}..., "
            f"data_cards/{name}.md says {wanted[:16]}...; take the file from a fresh clone"
        )
    return DataSet(
        name, split, torch.from_numpy(images), torch.from_numpy(labels),
        tuple(class_names(about)), facts["mean"], facts["std"], data_checksum(name),
    )  # fmt: skip


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


def _file(name: str, facts: dict, split: str) -> Path:
    """Embedded files lie in the package; others in $VITLIB_DATA/<name>."""
    folder = EMBEDDED if facts.get("embedded") else ROOT / os.environ.get("VITLIB_DATA", "data") / name
    return folder / facts["files"][split]


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
