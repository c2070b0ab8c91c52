"""Images with labels: held as one tensor (`memory.py`) or opened as they are needed (`stream.py`), with the same methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vitlib.data.augment import Augment
from vitlib.data.memory import WHOLE, Batch, DataSet, InMemory, Shard, held_out, per_channel, resize, subset
from vitlib.data.read import Found, decode, read_folder, read_split
from vitlib.data.stream import Streamed

__all__ = [
    "HELD", "WHOLE", "Augment", "Batch", "DataSet", "Found", "InMemory", "Shard", "Streamed", "held_out", "middle", "open_folder",
    "per_channel", "read_folder", "resize", "subset",
]  # fmt: skip

HELD = 2**30  # bytes of pixels up to which a folder is held in memory


def open_folder(
    folder: Path | str, split: str, image_size: int, *, streamed: bool | None = None, augment: Augment | None = None,
    workers: int = 0, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DataSet:  # fmt: skip
    """train, validation or test images of a folder of one's own: any number of them, of any sizes, in colour.

    `read.read_folder` says which forms a folder may have, `read.read_split` what is held out where a split is missing.
    streamed: None = where all images at `image_size` take more than a gigabyte. In memory, an image is its middle square,
    resized once; streamed, it is what `augment` makes of it in each epoch, decoded by `workers` processes. `mean` and `std`
    are ImageNet's, not measured, as pretrained models want them. Raises UsageError as `read.read_folder` and `read.decode`.
    """
    name, found, statistics = Path(folder).resolve().name, read_split(folder, split), map(per_channel, (mean, std))
    count = len(found.labels)
    if streamed or (streamed is None and count * 3 * image_size**2 > HELD):
        return Streamed(name, split, found, image_size, augment or Augment(), workers, *statistics)
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(count):
        images[i] = middle(pil_to_tensor(decode(found.rows, i)), image_size)
    return InMemory(name, split, images, torch.from_numpy(found.labels), found.classes, *statistics, found.checksum())


def middle(image: Tensor, size: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, size, size): the middle square, resized."""
    side = min(image.shape[1:])
    top, left = ((extent - side) // 2 for extent in image.shape[1:])
    return resize(image[None, :, top : top + side, left : left + side], size)[0]
