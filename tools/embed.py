"""Make lab/data/embedded/*.parquet from the original files.

    apt-get install dataset-fashion-mnist
    python -m tools.embed fashion-mnist /usr/share/datasets/fashion-mnist

    pip download --no-deps scikit-learn==1.9.1
    python -m tools.embed digits scikit_learn-1.9.1-*.whl

    pip download --no-deps animal-mnist==0.4
    python -m tools.embed animal-shapes animal_mnist-0.4-py3-none-any.whl

Fixed rules, no random number. Wheels are read as zip files: nothing is installed, imported or run. Images are lossless
PNGs in the Hugging Face layout, so `datasets` reads the files as they are. Run again, it makes the same pixels and
labels (the checksums in data_cards/ are over the decoded arrays).
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lab.data.cards import checksum, class_names, read_card
from lab.paths import DATA_CARDS, EMBEDDED


def fashion_mnist(folder: Path) -> None:
    """Of each class the first 2,000 training images, of those the last 200 for validation; test images from 5,000."""
    images, labels = read_idx(folder / "train-images-idx3-ubyte.gz"), read_idx(folder / "train-labels-idx1-ubyte.gz")
    write("fashion-mnist", "train", images, labels, of_each_class(labels, 0, 1800))
    write("fashion-mnist", "validation", images, labels, of_each_class(labels, 1800, 2000))
    images, labels = read_idx(folder / "t10k-images-idx3-ubyte.gz"), read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    write("fashion-mnist", "test", images, labels, np.arange(5_000, 10_000))


def digits(wheel: Path) -> None:
    """Cut between sheets of handwriting: 8 for training (of each class the first 100), 1 for validation, 5 for test."""
    with zipfile.ZipFile(wheel) as files:
        table = gzip.decompress(files.read("sklearn/datasets/data/digits.csv.gz")).decode()
    table = np.array([line.split(",") for line in table.split()], dtype=float).astype(np.int64)
    images, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
    images = ((images * 255 + 8) // 16).astype(np.uint8)  # 0 to 16 ink pixels -> 0 to 255, one to one
    write("digits", "train", images, labels, of_each_class(labels[:1029], 0, 100))
    write("digits", "validation", images, labels, np.arange(1029, 1157))
    write("digits", "test", images, labels, np.arange(1157, 1797))


def animal_shapes(wheel: Path) -> None:
    """Second copies left out; then of each class the first 500 for training, 100 for validation, 200 for test."""
    with zipfile.ZipFile(wheel) as files:
        images, labels = (
            read_array(gzip.decompress(files.read(f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz")))
            for part in ("data", "label")
        )
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first = np.sort(first)
    for split, start, end in (("train", 0, 500), ("validation", 500, 600), ("test", 600, 800)):
        write("animal-shapes", split, images, labels, first[of_each_class(labels[first], start, end)])


MAKERS = {"fashion-mnist": fashion_mnist, "digits": digits, "animal-shapes": animal_shapes}


def of_each_class(labels: np.ndarray, start: int, end: int) -> np.ndarray:
    """Of each class its images number `start` to `end`: their rows, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[start:end] for c in range(10)]))


def read_idx(path: Path) -> np.ndarray:
    """One file of the MNIST format: magic number with the number of dimensions, sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


class _Type:
    """Stands in for numpy.dtype: notes the code ("u1") and, as state, the byte order ("|")."""

    def __init__(self, code: str, align: bool, copy: bool) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code


class _Array:
    """Stands in for numpy.ndarray: notes shape, type, memory order and bytes."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran, self.raw = state


STAND_INS = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type}
STAND_INS |= {(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the three names of a pickled array, each as a stand-in: neither NumPy's code nor any other is called."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in STAND_INS:
            raise ValueError(f"refused: {module}.{name} is no part of a pickled array")
        return STAND_INS[module, name]


def read_array(raw: bytes) -> np.ndarray:
    """A pickled array of bytes or int64. Raises ValueError for a pickle that holds, or calls, anything else."""
    found = _ArrayUnpickler(io.BytesIO(raw)).load()
    if not isinstance(found, _Array) or found.type.code not in ("|u1", "<i8") or found.fortran:
        raise ValueError("refused: not an array of bytes or int64")
    return np.frombuffer(found.raw, found.type.code).reshape(found.shape)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(name: str, split: str, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
    """These rows of `images` uint8 (N, H, W) and `labels` (N,) as <name>-<split>.parquet; prints what the card needs."""
    classes = class_names(read_card(DATA_CARDS / f"{name}.md"))
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    features["row"] = {"dtype": "int64", "_type": "Value"}
    image = pa.array(
        [{"bytes": png(images[r]), "path": None} for r in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": pa.array(labels[rows].astype(np.int64)), "row": pa.array(rows)})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = EMBEDDED / f"{name}-{split}.parquet"
    pq.write_table(table, path, compression="zstd")
    digest, pixels = checksum(images[rows][:, None], labels[rows].astype(np.int64)), images[rows] / 255
    print(f"{split}: {len(rows)} images, {path.stat().st_size:,} bytes, sha256 {digest}")
    print(f"  mean {pixels.mean():.5f}, std {pixels.std(ddof=1):.5f}, a class {np.bincount(labels[rows]).tolist()}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        sys.exit(__doc__)
    MAKERS[sys.argv[1]](Path(sys.argv[2]))
