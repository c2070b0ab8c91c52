"""Images with labels: held as one tensor (`memory.py`) or opened as they are needed (`stream.py`), with the same methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vitlib.data.augment import Augment
from vitlib.data.memory import WHOLE, Batch, DataSet, InMemory, Shard, held_out, resize, subset
from vitlib.data.read import Found, decode, read_folder, read_split, readable
from vitlib.data.stream import Streamed
from vitlib.errors import UsageError

__all__ = [
    "HELD", "WHOLE", "Augment", "Batch", "DataSet", "Found", "InMemory", "Shard", "Streamed", "held_out", "middle", "open_folder",
    "read_folder", "resize", "subset",
]  # fmt: skip

HELD = 2**30  # bytes of pixels up to which a folder is held in memory


def open_folder(
    folder: Path | str, split: str, image_size: int, *, streamed: bool | None = None, augment: Augment | None = None,
    workers: int = 0, num_classes: int | None = None, skip_unreadable: bool = False,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DataSet:  # fmt: skip
    """train, validation or test images of a folder of one's own: any number of them, of any sizes, in colour.

    `read.read_folder` says which forms a folder may have, `read.read_split` what is held out where a split is missing.
    streamed: None = where all images at `image_size` take more than a gigabyte. In memory, an image is its middle square,
    resized once; streamed, it is what `augment` makes of it in each epoch, decoded by `workers` processes. `mean` and `std`
    are ImageNet's, not measured, as pretrained models want them. `num_classes` is what the caller's model has.
    `skip_unreadable` decodes every image once beforehand and leaves out those that cannot be read, with a warning.

    Raises UsageError for what cannot be read: see `read.read_folder`.
    """
    name, found = Path(folder).resolve().name, read_split(folder, split)
    if num_classes not in (None, len(found.classes)):
        raise UsageError(f"{name} {split} has {len(found.classes)} classes, {num_classes} are expected")
    if skip_unreadable:
        found = readable(found, f"{name} {split}")
    count, statistics = len(found.labels), [torch.tensor(values).view(-1, 1, 1) for values in (mean, std)]
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
