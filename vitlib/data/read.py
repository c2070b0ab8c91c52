"""Images that are opened one at a time: files, rows of a table that is mapped into memory, or the arrays of CIFAR.

Memory does not grow with the pixels: a set keeps its paths in one block, or nothing but a mapped file.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vitlib.errors import UsageError

NOT_AN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # what Pillow raises


class Rows(Protocol):
    """Images that are opened one at a time."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a message calls image i."""

    def open(self, i: int) -> Image.Image:
        """Pillow's image, perhaps not decoded yet."""

    def listing(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every image, for the checksum. Decodes nothing."""

    def take(self, index: np.ndarray) -> Rows:
        """These images only, in this order."""


@dataclass(frozen=True, eq=False)
class Files:
    """One file an image."""

    folder: Path
    paths: pa.Array  # relative to the folder; one block of memory, where a list of str would be copied in every worker

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.folder / self.paths[i].as_py())

    def open(self, i: int) -> Image.Image:
        return Image.open(self.name(i))

    def listing(self) -> Iterator[tuple[str, int]]:
        for path in map(str, self.paths):
            try:
                yield path, os.stat(os.path.join(self.folder, path)).st_size
            except OSError as fault:
                raise UsageError(f"there is no file {self.folder / path}, but the list of images names it") from fault

    def take(self, index: np.ndarray) -> Files:
        return replace(self, paths=self.paths.take(pa.array(index)))


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a `datasets.Dataset`; its one column holds {"bytes", "path"}, not decoded."""

    rows: object
    column: str
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"{self.rows[i][self.column]['path'] or 'image'} in row {i} of {self.source}"

    def open(self, i: int) -> Image.Image:
        cell = self.rows[i][self.column]
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

    def listing(self) -> Iterator[tuple[str, int]]:
        cells = self.rows.with_format("arrow").select_columns([self.column])
        i = 0
        for part in cells.iter(batch_size=1000):
            for size in pc.binary_length(pc.struct_field(part[self.column], "bytes")).to_pylist():
                yield f"{i:08d}", size or 0
                i += 1

    def take(self, index: np.ndarray) -> Table:
        return replace(self, rows=self.rows.select(index))


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images that are distributed as arrays: uint8 (N, H, W, 3)."""

    pixels: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, i: int) -> str:
        return f"image {i} of {self.source}"

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def listing(self) -> Iterator[tuple[str, int]]:
        return ((f"{i:08d}", self.pixels[i].size) for i in range(len(self)))

    def take(self, index: np.ndarray) -> Arrays:
        return replace(self, pixels=self.pixels[index])


@dataclass(frozen=True, eq=False)
class Found:
    """One split: rows, labels int64 (N,), and the names of the classes in the order of their labels."""

    rows: Rows
    labels: np.ndarray
    classes: tuple[str, ...]

    def take(self, index: np.ndarray) -> Found:
        return replace(self, rows=self.rows.take(index), labels=self.labels[index])

    def checksum(self) -> str:
        """SHA-256, 16 digits, over the sorted list of (name, size in bytes, label).

        Over names and sizes, not over pixels: reading 1.28 million images would take longer than an epoch. In a table the
        row's number is the name, so that shards may be cut differently.
        """
        listed = zip(self.rows.listing(), self.labels.tolist(), strict=True)
        lines = sorted(f"{name}\t{size}\t{label}\n" for (name, size), label in listed)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def decode(rows: Rows, i: int) -> Image.Image:
    """Image i in RGB. Raises UsageError that names it if it cannot be read."""
    try:
        with rows.open(i) as image:
            return image.convert("RGB")
    except NOT_AN_IMAGE as fault:
        raise UsageError(
            f"{rows.name(i)} cannot be read ({type(fault).__name__}): replace it, or open the data with skip_unreadable=True"
        ) from fault


def unreadable(rows: Rows, threads: int = 1) -> list[int]:
    """Every image that cannot be read, by decoding each of them once: the JPEGs at an eighth of their side, which reads
    the whole file in a third of the time.
    """

    def faulty(i: int) -> bool:
        try:
            with rows.open(i) as image:
                image.draft("RGB", (1, 1))
                image.load()
            return False
        except NOT_AN_IMAGE:
            return True

    parts = np.array_split(np.arange(len(rows)), max(len(rows) // 500, 1))
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        found = pool.map(lambda part: [int(i) for i in part if faulty(int(i))], parts)
        return [i for part in found for i in part]
