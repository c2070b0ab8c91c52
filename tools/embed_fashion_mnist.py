"""Make vitlib/data/embedded/fashion-mnist-*.parquet from the original Fashion-MNIST files.

    apt-get install dataset-fashion-mnist
    python tools/embed_fashion_mnist.py [FOLDER]     (default: where Debian's package puts the four .gz files)

Fixed rule, no random number: of each class, the first 2,000 of the 60,000 training images in the original order;
of those, the last 200 are the validation split. The test split is original test images 5,000 to 9,999. Images are
lossless PNGs in the Hugging Face layout, so `datasets` reads the files as they are. Run again, it makes the same
pixels and labels (the checksums in data_cards/fashion-mnist.md are over the decoded arrays).
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitlib.data.registry import checksum
from vitlib.paths import EMBEDDED

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TRAIN_PER_CLASS, VALIDATION_PER_CLASS = 2000, 200
TEST_FROM, TEST_TO = 5_000, 10_000


def read_idx(path: Path) -> np.ndarray:
    """One file of the MNIST format: magic number with the number of dimensions, sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def write(split: str, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    features["row"] = {"dtype": "int64", "_type": "Value"}
    image = pa.array(
        [{"bytes": png(images[r]), "path": None} for r in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": pa.array(labels[rows].astype(np.int64)), "row": pa.array(rows)})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = EMBEDDED / f"fashion-mnist-{split}.parquet"
    pq.write_table(table, path, compression="zstd")
    digest = checksum(images[rows][:, None], labels[rows].astype(np.int64))
    print(f"{split}: {len(rows)} images, {path.stat().st_size:,} bytes, sha256 {digest}")


def main(folder: Path) -> None:
    images, labels = read_idx(folder / "train-images-idx3-ubyte.gz"), read_idx(folder / "train-labels-idx1-ubyte.gz")
    kept = [np.flatnonzero(labels == c)[:TRAIN_PER_CLASS] for c in range(10)]
    cut = TRAIN_PER_CLASS - VALIDATION_PER_CLASS
    write("train", images, labels, np.sort(np.concatenate([rows[:cut] for rows in kept])))
    write("validation", images, labels, np.sort(np.concatenate([rows[cut:] for rows in kept])))
    images, labels = read_idx(folder / "t10k-images-idx3-ubyte.gz"), read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    write("test", images, labels, np.arange(TEST_FROM, TEST_TO))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist"))
