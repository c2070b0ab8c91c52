"""Data that is not embedded: a folder in $VITLIB_DATA, else the Hugging Face Hub by name; decoded into arrays.

A folder holds parquet files (`train.parquet`, or shards `train-*.parquet`, also under `data/`), class folders
(`train/<class>/*.png`), or another of the layouts of `readers.py`. A card's `vitlib:` block says under which names a folder is looked for, the Hub's name, and which
names the splits have. Validation images are held out of the training images: of each class the last tenth, in file order.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lab.data import readers
from vitlib.data.read import NOT_AN_IMAGE, Found, decode
from vitlib.errors import UsageError

HELD_OUT = 10  # of each class, one image in ten
COLUMNS = {"image": readers.IMAGE_COLUMNS, "label": readers.LABEL_COLUMNS}


class DataAbsent(UsageError):
    """A data set that is nowhere to be found: where it was looked for, and how to get it."""


def read(name: str, about: dict) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """Split -> images uint8 (N, C, H, W), labels int64 (N,), class names; train, validation, test. Raises DataAbsent."""
    facts, folder = about["vitlib"], readers.locate(name)
    found = {}
    for split, names in facts["splits"].items():
        found[split] = _folder(folder, names, name, facts) if folder else _hub(name, names, facts)
    if found["train"][2] != found["test"][2]:
        raise UsageError(
            f"{name}: the training images have {len(found['train'][2])} classes and the test images "
            f"{len(found['test'][2])}, or others: both must name the same"
        )
    images, labels, classes = found["train"]
    held = held_out(labels)
    return {
        "train": (images[~held], labels[~held], classes),
        "validation": (images[held], labels[held], classes),
        "test": found["test"],
    }


def held_out(labels: np.ndarray, share: int = HELD_OUT) -> np.ndarray:
    """bool (N,): of each class the last of so many, at least one image."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[len(rows) - max(len(rows) // share, 1) :]] = True
    return held


def signature(name: str, about: dict) -> str:
    """What says, without decoding, that a data set is still the same: its files' names, sizes and times, or the Hub's name."""
    folder = readers.locate(name)
    files = [] if folder is None else [p for p in sorted(folder.rglob("*")) if p.is_file()]
    stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    text = json.dumps([name, str(folder), stats, about["vitlib"]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folder(folder: Path, names: list[str], name: str, facts: dict) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One split of a folder, under the first of its names that is there."""
    for split in names:  # by pyarrow and Pillow alone, which every machine has that trains
        shards = sorted({*folder.glob(f"**/{split}.parquet"), *folder.glob(f"**/{split}-*.parquet")})
        if shards:
            return _parquet(shards, facts["channels"])
    query = readers.Query(name, tuple(names))
    for layout in readers.LAYOUTS:
        place = layout.where(folder)
        if place is not None and (found := layout.read(place, query)) is not None:
            return _decoded(found, folder, facts["channels"])
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise UsageError(
        f"data set {name!r}: {folder} has no split {' or '.join(names)} (parquet files or class folders); it holds {there}"
    )


def _decoded(found: Found, where: object, channels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Every image of a split in memory."""
    images = (_array(decode(found.rows, i), channels) for i in range(len(found.labels)))
    return _stack(images, where), found.labels, list(found.classes)


def _parquet(shards: list[Path], channels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    images, labels, classes = [], [], None
    for path in shards:
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as fault:
            raise UsageError(f"{path} is damaged and cannot be read ({type(fault).__name__})") from fault
        image, label = (_column(table, kind, path) for kind in ("image", "label"))
        cells = (cell["bytes"] if isinstance(cell, dict) else cell for cell in table[image].to_pylist())
        images += [_pixels(cell, channels, f"{path}, row {row}") for row, cell in enumerate(cells)]
        labels.append(table[label].to_numpy())
        classes = classes or _named(table.schema.metadata or {}, label)
    numbers = np.concatenate(labels).astype(np.int64)
    return _stack(images, shards[0].parent), numbers, classes or [str(k) for k in range(int(numbers.max()) + 1)]


def _column(table: pa.Table, kind: str, path: Path) -> str:
    for column in COLUMNS[kind]:
        if column in table.column_names:
            return column
    wanted = " or ".join(COLUMNS[kind])
    raise UsageError(f"{path} has no column {wanted}: it has {', '.join(table.column_names)}")


def _named(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """The class names in a parquet file of the `datasets` library."""
    info = json.loads(metadata.get(b"huggingface", b"{}"))
    return info.get("info", {}).get("features", {}).get(label, {}).get("names")


def _hub(name: str, names: list[str], facts: dict) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One split from the Hub, or from what `datasets` has stored of it before."""
    try:
        found = readers.read_hub(readers.Query(facts["hub"], tuple(names)))
    except UsageError as fault:
        folders = " or ".join(map(str, readers.places(name)))
        raise DataAbsent(
            f"data set {name!r} is not there: looked for {folders} (VITLIB_DATA names the folder above), and "
            f"{fault}; data_cards/{name}.md says how to get it"
        ) from None
    return _decoded(found, facts["hub"], facts["channels"])


def _pixels(cell: bytes, channels: int, where: str) -> np.ndarray:
    """An encoded image as uint8 (C, H, W)."""
    try:
        with Image.open(io.BytesIO(cell)) as picture:
            return _array(picture, channels)
    except NOT_AN_IMAGE as fault:
        raise UsageError(f"the image {where} cannot be read ({type(fault).__name__})") from fault


def _array(picture: Image.Image, channels: int) -> np.ndarray:
    """uint8 (C, H, W); grey images get the channels that the data set has."""
    pixels = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _stack(images: Iterable[np.ndarray], where: object) -> np.ndarray:
    images = list(images)
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        some = ", ".join(f"{w}x{h}" for _, h, w in sorted(shapes)[:3])
        raise UsageError(
            f"the images of {where} have {len(shapes)} sizes ({some}, ...): allowed is one size throughout"
        )
    return np.stack(images)


@functools.lru_cache(maxsize=4)
def arrays(name: str, key: str) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """`read`, once a process; `key` is the data set's `signature`."""
    from lab.data.registry import card

    return read(name, card(name))
