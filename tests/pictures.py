"""Small pictures, and folders of them in the two forms that everybody's data has. For tests of data and of runs on it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TRAIN, TEST = [0, 0, 0, 1, 1, 2, 2], [0, 1, 2]  # labels of every stand-in, in the order of the split


def picture(number: int, side: tuple[int, int] = (24, 20)) -> Image.Image:
    """A picture of its own for every number: 24x20 pixels of noise on a colour."""
    noise = np.random.default_rng(number).integers(0, 120, (side[1], side[0], 3))
    return Image.fromarray((noise + np.array([37, 61, 17]) * number % 120).astype(np.uint8))


def encoded(number: int, form: str = "JPEG", side: tuple[int, int] = (24, 20)) -> bytes:
    file = io.BytesIO()
    picture(number, side).save(file, form, quality=95)
    return file.getvalue()


def write(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path


def class_folders(folder: Path, names: Sequence[str] = ("n01", "n02", "n03"), test: str = "val") -> Path:
    for split, labels in (("train", TRAIN), (test, TEST)):
        for number, label in enumerate(labels):
            write(folder / split / names[label] / f"{number:03d}.JPEG", number)
    return folder


def table(path: Path, labels: Sequence, first: int = 0, image: str = "image", label: str = "label") -> Path:
    """One parquet file as Hugging Face writes them, without the names of the classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(first + i), "path": f"{first + i}.jpg"} for i in range(len(labels))]
    pq.write_table(pa.table({image: cells, label: labels}), path)
    return path


def parquet(
    folder: Path, splits: Sequence = (("train", TRAIN), ("test", TEST)), shards: int = 2, **columns: str
) -> Path:
    for split, labels in splits:
        first = 0
        for shard, part in enumerate(np.array_split(labels, shards)):
            table(folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet", part.tolist(), first, **columns)
            first += len(part)
    return folder
