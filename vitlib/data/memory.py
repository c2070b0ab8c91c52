"""Images as one tensor, and the batches of an epoch: resize, flip, mixup on whole batches.

Every draw is a function of (seed, purpose, epoch, image index): see `vitlib.draws`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib import draws
from vitlib.errors import UsageError


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


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (N, C, H, W) -> uint8 (N, C, size, size): bilinear, antialiased; the only resize there is.

    In float64 with ties rounded up, so that every machine gets the same pixels: in float32 the last bit of an exact half
    depends on the processor's instructions.
    """
    if images.shape[-2:] == (size, size):
        return images
    parts = [
        F.interpolate(part.double(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        for part in images.split(4096)
    ]
    return torch.cat(parts).add_(0.5 + 1e-6).floor_().clamp_(0, 255).to(torch.uint8)


def subset(data: DataSet, count: int | None, seed: int) -> np.ndarray:
    """Indices of `count` images, the same number of each class, nested: the 200 are among the 500. None = all.

    Equal for all arms of a seed. Raises UsageError for a count that the classes cannot share equally.
    """
    if count is None:
        return np.arange(len(data))
    classes = len(data.classes)
    labels = data.labels.numpy()
    fewest = int(np.bincount(labels, minlength=classes).min())
    if count % classes or not 0 < count // classes <= fewest:
        raise UsageError(
            f"{count} images of {data.name} cannot be class-balanced: allowed are multiples of {classes} "
            f"from {classes} to {fewest * classes}"
        )
    position = draws.uniform(seed, "subset", 0, np.arange(len(data)))[:, 0]
    chosen = [
        rows[np.argsort(position[rows], kind="stable")][: count // classes]
        for rows in (np.flatnonzero(labels == c) for c in range(classes))
    ]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Shard:
    """Which part of the images belongs to this process. The order of an epoch and its batches do not depend on it."""

    rank: int = 0
    world: int = 1

    def own(self, index: np.ndarray) -> np.ndarray:
        """This process's contiguous part, perhaps empty; sizes differ by at most one and the parts make the whole."""
        return np.array_split(index, self.world)[self.rank]

    def part(self, index: np.ndarray) -> tuple[np.ndarray, float]:
        """This process's part of a global batch, and the weight of its mean: the mean over processes of weight x mean of
        the part is the mean of the whole. A process that would get nothing takes the first image with weight 0, since
        all take every step together.
        """
        own = self.own(index)
        return (own, len(own) * self.world / len(index)) if len(own) else (index[:1], 0.0)


WHOLE = Shard()  # of a process that trains alone


@dataclass(frozen=True)
class Batch:
    """`index` (B,) says which images of the split these are; every further draw is made from it."""

    images: Tensor  # float (B, C, H, W), normalised
    targets: Tensor  # int64 (B,), or float (B, classes) under mixup
    index: np.ndarray  # int64 (B,)
    flipped: Tensor  # bool (B,)
    epoch: int
    weight: float = (
        1.0  # of this part's mean, where the batch is shared by processes or goes through the model in parts
    )
    view: Tensor | None = None  # uint8 (B, C, h, w): the same crops at another size, for a tokenizer
    last: bool = True  # no further part of this step's batch follows

    def to(self, device: str, memory_format: torch.memory_format = torch.preserve_format) -> Batch:
        """What the model reads on `device`. `flipped` stays: it looks up tokens, which lie in main memory."""
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        view = None if self.view is None else self.view.to(device, non_blocking=True)
        return replace(self, images=images, targets=self.targets.to(device, non_blocking=True), view=view)

    def pin_memory(self) -> Batch:
        """What `to` copies in page-locked memory, where a GPU fetches it by itself; a DataLoader calls this."""
        view = None if self.view is None else self.view.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory(), view=view)

    def parts(self, count: int) -> Iterator[Batch]:
        """`count` parts in order, fewer where there are fewer images; their weights make the weight of the whole."""
        if count == 1:
            yield self
            return
        sizes = [len(own) for own in np.array_split(self.index, min(count, len(self.index)))]
        ends = np.cumsum(sizes).tolist()
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            own, view = slice(start, end), None if self.view is None else self.view[start:end]
            yield replace(
                self, images=self.images[own], targets=self.targets[own], index=self.index[own], view=view,
                flipped=self.flipped[own], weight=self.weight * (end - start) / ends[-1], last=end == ends[-1],
            )  # fmt: skip


def normalise(images: Tensor, data: DataSet) -> Tensor:
    """uint8 -> float32 with the training split's mean and deviation."""
    return (images.float() / 255 - data.mean) / data.std


def epoch_batches(
    data: DataSet, rows: np.ndarray, seed: int, epoch: int, batch_size: int, flip: bool, mixup: float,
    shard: Shard = WHOLE, skip: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """All of `rows` once, in this epoch's order; the last batch may be smaller.

    flip: mirror half of the images. mixup: alpha of the Beta distribution, 0 = off. skip: batches at the start that are
    left out, and not computed. Of every batch a process gets the part that `shard` says.
    """
    position = draws.uniform(seed, "order", epoch, rows)[:, 0]
    shuffled = rows[np.argsort(position, kind="stable")]
    for start in range(skip * batch_size, len(shuffled), batch_size):
        index, weight = shard.part(shuffled[start : start + batch_size])
        images, flipped = _flipped(data, index, seed, epoch, flip)
        targets = data.labels[torch.from_numpy(index)]
        if mixup > 0:
            images, targets = _mixed(data, rows, index, images, targets, seed, epoch, flip, mixup)
        yield Batch(images, targets, index, flipped, epoch, weight)


def evaluation_batches(data: DataSet, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
    """The images as they are, in the split's order; a process gets a contiguous part of the split, perhaps none."""
    rows = shard.own(np.arange(len(data)))
    for start in range(0, len(rows), batch_size):
        index = rows[start : start + batch_size]
        own = slice(index[0], index[-1] + 1)
        flipped = torch.zeros(len(index), dtype=torch.bool)
        yield Batch(normalise(data.images[own], data), data.labels[own], index, flipped, 0)


def _flipped(data: DataSet, index: np.ndarray, seed: int, epoch: int, flip: bool) -> tuple[Tensor, Tensor]:
    images = data.images[torch.from_numpy(index)]
    flipped = torch.from_numpy(draws.uniform(seed, "flip", epoch, index)[:, 0] < 0.5) & flip
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    return normalise(images, data), flipped


def _mixed(data, rows, index, images, targets, seed, epoch, flip, alpha):
    """Mixup with a partner and a weight that belong to the image, not to the batch.

    timm's Mixup pairs an image with its mirror position in the batch and draws one weight a batch, so an image's
    neighbours would change its noise; only its one-hot targets are used here.
    """
    from timm.data.mixup import one_hot

    partner = rows[(draws.uniform(seed, "mixup partner", epoch, index)[:, 0] * len(rows)).astype(np.int64)]
    weight = [
        np.random.Generator(np.random.Philox(draws.key(seed, "mixup", epoch, i))).beta(alpha, alpha) for i in index
    ]
    weight = torch.tensor(weight, dtype=torch.float32)
    other, _ = _flipped(data, partner, seed, epoch, flip)
    images = images * weight[:, None, None, None] + other * (1 - weight)[:, None, None, None]
    classes = len(data.classes)
    own, theirs = one_hot(targets, classes), one_hot(data.labels[torch.from_numpy(partner)], classes)
    return images, own * weight[:, None] + theirs * (1 - weight)[:, None]
