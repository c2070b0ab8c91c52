"""A split of images held as one tensor, and the batches of an epoch: order, flip and mixup, on whole batches.

Every draw is a function of (seed, purpose, epoch, image index), never of the batch: see `vitlib.draws`.
Shapes: N images in the split, B in a batch, C channels, S pixels a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import one_hot
from torch import Tensor

from vitlib import draws
from vitlib.errors import UsageError


class Batching(Protocol):
    """What of a recipe decides what an epoch's batches are: `vitlib.train.recipe.Recipe` says what each field means."""

    batch_size: int  # of the global batch, over all processes
    flip: bool
    mixup: float
    cutmix: float
    repeats: int
    augment: object


@dataclass(frozen=True)
class Shard:
    """Which part of the images this process has. The order of an epoch and its global batches do not depend on it."""

    rank: int = 0
    world: int = 1

    def own(self, index: np.ndarray) -> np.ndarray:
        """A contiguous part, perhaps empty; sizes differ by at most one and the parts of all ranks make the whole."""
        return np.array_split(index, self.world)[self.rank]

    def part(self, index: np.ndarray) -> tuple[np.ndarray, float]:
        """This rank's part of a global batch, and the weight of its mean: the mean over ranks of weight x mean of the part
        is the mean of the whole. An empty part gets one image with weight 0, because every rank must join the all-reduce.
        """
        own = self.own(index)
        return (own, len(own) * self.world / len(index)) if len(own) else (index[:1], 0.0)


WHOLE = Shard()  # of a process that trains alone


@dataclass(frozen=True)
class Batch:
    """`index` says which images of the split these are: every later draw (masks, drop-path, noise) is made from it."""

    images: Tensor  # float32 (B, C, S, S), normalised
    targets: Tensor  # int64 (B,); soft labels, float (B, classes), under mixup or cutmix
    index: np.ndarray  # int64 (B,); of a streamed data set image + N * repeat
    flipped: Tensor  # bool (B,)
    epoch: int
    weight: float = 1.0  # of this part's mean, where processes share the batch or it goes through the model in parts
    view: Tensor | None = None  # uint8 (B, C, h, w): the same crops at another size, for a tokenizer
    last: bool = True  # no further part of this step's batch follows

    def to(self, device: str) -> Batch:
        """What the model reads on `device`. `flipped` stays: it indexes tokens, which are in main memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a GPU copies while it computes; a DataLoader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        view = None if self.view is None else change(self.view)
        return replace(self, images=change(self.images), targets=change(self.targets), view=view)

    def parts(self, count: int) -> Iterator[Batch]:
        """`count` parts in order, fewer where there are fewer images; their weights add up to the weight of the whole."""
        if count == 1:
            yield self
            return
        # Sizes differ by at most one, larger parts first: 10 images in 3 parts are 4, 3, 3.
        sizes = [len(own) for own in np.array_split(self.index, min(count, len(self.index)))]
        ends = np.cumsum(sizes).tolist()
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            own = slice(start, end)
            part = replace(self._each(itemgetter(own)), index=self.index[own], flipped=self.flipped[own])
            # A part weighs as many images as it has, so that the gradients of all parts add up to that of the whole.
            yield replace(part, weight=self.weight * (end - start) / ends[-1], last=end == ends[-1])


class DataSet(ABC):
    """One split, held as one tensor (`InMemory`) or opened image by image (`Streamed`)."""

    name: str
    split: str
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # in the order of their labels
    mean: Tensor  # float32 (C, 1, 1), of pixels / 255: what batches are normalised with
    std: Tensor
    image_size: int  # S
    checksum: str
    streamed: bool  # an image may be another crop in every epoch: nothing about it can be looked up by its index

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32, with the data set's mean and standard deviation."""
        return (pixels.float() / 255 - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    @abstractmethod
    def take(self, index: np.ndarray | Tensor) -> DataSet:
        """The same data set with these images only, in this order."""

    @abstractmethod
    def pixels(self) -> Tensor:
        """Every image, uint8 (N, C, S, S). Raises UsageError where they are not held in memory."""

    @abstractmethod
    def epoch_batches(
        self, rows: np.ndarray, seed: int, epoch: int, recipe: Batching, shard: Shard = WHOLE, skip: int = 0
    ) -> Iterator[Batch]:
        """`shard`'s part of each global batch of one epoch over the images `rows`; the last batch may be smaller.

        skip: this many global batches at the start are left out, without being computed. Raises UsageError where the
        recipe asks for what this kind of data set cannot do, and for an image that cannot be read.
        """

    @abstractmethod
    def evaluation_batches(self, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Every image once, in the split's order; targets are labels. `shard` has a contiguous part, perhaps none."""


@dataclass(frozen=True, eq=False)
class InMemory(DataSet):
    """One split as one tensor, images uint8 (N, C, S, S)."""

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    checksum: str
    streamed = False

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def take(self, index: np.ndarray | Tensor) -> InMemory:
        index = torch.as_tensor(index)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def pixels(self) -> Tensor:
        return self.images

    def epoch_batches(
        self, rows: np.ndarray, seed: int, epoch: int, recipe: Batching, shard: Shard = WHOLE, skip: int = 0
    ) -> Iterator[Batch]:
        """All of `rows` once, flipped and mixed as `recipe` says. Crops, cutmix and repeats need `Streamed`."""
        if recipe.augment is not None or recipe.cutmix or recipe.repeats != 1:
            raise UsageError(
                f"{self.name} is held in memory: augment, cutmix and repeats need a data set that is streamed"
            )
        return self._batches(rows, seed, epoch, recipe, shard, skip)

    def _batches(self, rows, seed, epoch, recipe, shard, skip) -> Iterator[Batch]:
        # The epoch's order: the images sorted by their own draw.
        shuffled = rows[np.argsort(draws.uniform(seed, "order", epoch, rows)[:, 0], kind="stable")]
        for start in range(skip * recipe.batch_size, len(shuffled), recipe.batch_size):
            # This rank's part of the global batch: (B,)
            index, weight = shard.part(shuffled[start : start + recipe.batch_size])
            images, flipped = self._flipped(index, seed, epoch, recipe.flip)
            targets = self.labels[torch.from_numpy(index)]
            if recipe.mixup > 0:
                images, targets = self._mixed(rows, index, images, targets, seed, epoch, recipe)
            yield Batch(images, targets, index, flipped, epoch, weight)

    def evaluation_batches(self, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        rows = shard.own(np.arange(len(self)))
        for start in range(0, len(rows), batch_size):
            index = rows[start : start + batch_size]
            own = slice(index[0], index[-1] + 1)  # contiguous: a view, not a copy
            unflipped = torch.zeros(len(index), dtype=torch.bool)
            yield Batch(self.normalise(self.images[own]), self.labels[own], index, unflipped, 0)

    def _flipped(self, index: np.ndarray, seed: int, epoch: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Half of the images mirrored, then normalised: float32 (B, C, S, S), and which they were, bool (B,)."""
        images = self.images[torch.from_numpy(index)]  # uint8 (B, C, S, S)
        # The draw is made with `flip` off too: which images are mirrored does not depend on other draws.
        flipped = torch.from_numpy(draws.uniform(seed, "flip", epoch, index)[:, 0] < 0.5) & flip
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return self.normalise(images), flipped

    def _mixed(self, rows, index, images, targets, seed, epoch, recipe) -> tuple[Tensor, Tensor]:
        """Mixup with a partner and a weight that belong to the image: (B, C, S, S) and soft labels (B, classes).

        timm's Mixup pairs an image with its mirror position in the batch and draws one weight per batch, so that an image's
        neighbours would change its noise; only its one-hot targets are used here.
        """

        # A partner for each image, from the whole subset and not only from its batch.
        partner = rows[(draws.uniform(seed, "mixup partner", epoch, index)[:, 0] * len(rows)).astype(np.int64)]
        # Beta(alpha, alpha) takes a varying number of draws: each image gets a generator of its own.
        keys = (draws.key(seed, "mixup", epoch, i) for i in index)
        drawn = [np.random.Generator(np.random.Philox(key)).beta(recipe.mixup, recipe.mixup) for key in keys]
        weight = torch.tensor(drawn, dtype=torch.float32)
        # The partner as it is seen in this epoch, flip included.
        other, _ = self._flipped(partner, seed, epoch, recipe.flip)
        # (B,) -> (B, 1, 1, 1): one weight for all pixels of an image.
        images = images * weight[:, None, None, None] + other * (1 - weight)[:, None, None, None]
        # Soft labels in the same proportion; where both images are of one class they are one-hot again.
        classes = len(self.classes)
        own, theirs = one_hot(targets, classes), one_hot(self.labels[torch.from_numpy(partner)], classes)
        return images, own * weight[:, None] + theirs * (1 - weight)[:, None]


def per_channel(values: Sequence[float]) -> Tensor:
    """(C,) -> float32 (C, 1, 1)."""
    return torch.tensor(values).view(-1, 1, 1)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (N, C, H, W) -> uint8 (N, C, size, size): bilinear, antialiased; the only resize of images in memory.

    In float64 with ties rounded up, so that every machine gets the same pixels: in float32 the last bit of an exact half
    depends on the processor's instructions.
    """
    if images.shape[-2:] == (size, size):
        return images

    resized = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for part, place in zip(images.split(512), resized.split(512), strict=True):  # float64 takes eight times the memory
        pixels = F.interpolate(part.double(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        # The small offset carries sums that rounding left just below a half over it.
        place.copy_(pixels.add_(0.5 + 1e-6).floor_().clamp_(0, 255))
    return resized


def subset(data: DataSet, count: int | None, seed: int, number: int = 0) -> np.ndarray:
    """Indices of `count` images, the same number of each class, nested: the 200 are among the 500. None = all.

    Equal for all arms of a seed; `number` picks one of several subsets of that seed. Raises UsageError for a count
    that the classes cannot share equally.
    """
    if count is None:
        return np.arange(len(data))
    classes = len(data.classes)
    labels = data.labels.numpy()
    fewest = int(np.bincount(labels, minlength=classes).min())
    if count % classes or not 0 < count // classes <= fewest:
        allowed = f"multiples of {classes} from {classes} to {fewest * classes}"
        raise UsageError(f"{count} images of {data.name} cannot be class-balanced: allowed are {allowed}")
    # The order does not depend on `count`: a larger subset continues a smaller one.
    position = draws.uniform(seed, "subset", number, np.arange(len(data)))[:, 0]
    # Of each class the images whose draws come first.
    chosen = [
        rows[np.argsort(position[rows], kind="stable")][: count // classes]
        for rows in (np.flatnonzero(labels == c) for c in range(classes))
    ]
    return np.sort(np.concatenate(chosen))  # int64 (count,), in the split's order


def held_out(labels: np.ndarray, share: int = 10) -> np.ndarray:
    """bool (N,): of each class the last of `share` images, at least one. What validates where a folder has no such split."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[len(rows) - max(len(rows) // share, 1) :]] = True
    return held
