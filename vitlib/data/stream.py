"""Images that are opened as they are needed, and the batches of an epoch: for data that does not fit into one tensor.

Worker processes decode and augment (`augment.py`) batch by batch. The order of an epoch, its global batches and its pairs for
mixup and cutmix are functions of (seed, epoch), every other draw of (seed, epoch, image, repeat): no number of workers or
processes, and no resumption in the middle of an epoch, changes a pixel.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target, one_hot
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitlib import draws
from vitlib.data.augment import Augment, TestView, TrainView, own_draws
from vitlib.data.memory import WHOLE, Batch, Batching, DataSet, Shard, per_channel
from vitlib.data.read import Found, decode
from vitlib.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = map(per_channel, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
SHARED = "/dev/shm"  # where worker processes put their batches on Linux; a container has 64 MB of it
View = Callable[[Image.Image, bool, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Streamed(DataSet):
    """One split on disk, in colour. Labels are at hand; an image is decoded when a batch asks for it and then forgotten."""

    name: str
    split: str
    found: Found
    image_size: int
    augment: Augment  # its `test_crop` and `interpolation` are those of evaluation
    workers: int = 0  # processes that decode; 0 = this one
    mean: Tensor = IMAGENET_MEAN
    std: Tensor = IMAGENET_STD
    streamed = True

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.found.labels)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.found.classes

    @functools.cached_property
    def checksum(self) -> str:
        """`read.Found.checksum`: asks for the size of every file when it is first wanted."""
        return self.found.checksum()

    def take(self, index: np.ndarray | Tensor) -> Streamed:
        return replace(self, found=self.found.take(np.asarray(index)))

    def pixels(self) -> Tensor:
        raise UsageError(f"{self.name} is streamed, not held in memory: all of its pixels at once cannot be had")

    def view(self, augment: Augment | None) -> View:
        """What is done to a decoded image: `augment`'s training view, or the test view for None."""
        kind = TestView if augment is None else TrainView
        mean, std = (tuple(channel.flatten().tolist()) for channel in (self.mean, self.std))
        return kind(augment or self.augment, self.image_size, mean, std)

    def epoch_batches(
        self, rows: np.ndarray, seed: int, epoch: int, recipe: Batching, shard: Shard = WHOLE, skip: int = 0
    ) -> Iterator[Batch]:
        """As many samples as `rows` has images, n, in the view of `recipe.augment` (None = the test view, flipped).

        With repeated augmentation these are ceil(n / repeats) different images, `repeats` views of each (of the last one
        what is left of n), all of them in the same global batch or two neighbouring ones. Released code: orders by epoch
        alone and keeps n // 256 * 256 samples, none of a set below 256; here seed and epoch decide, and every n works.

        Images 2k and 2k + 1 of a global batch are mixed with each other, an odd last one stays as it is.
        """
        order = epoch_order(len(self), rows, seed, epoch, recipe.repeats)
        return _load(
            Batches(self, order, recipe.batch_size, self.view(recipe.augment), seed, epoch, recipe, shard), skip
        )

    def evaluation_batches(self, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        return _load(Batches(self, shard.own(np.arange(len(self))), batch_size, self.view(None)))


def epoch_order(images: int, rows: np.ndarray, seed: int, epoch: int, repeats: int) -> np.ndarray:
    """The epoch's samples, image + images * repeat: n = len(rows) of them, the views of an image side by side."""
    position = draws.uniform(seed, "order", epoch, rows)[:, 0]
    shuffled = rows[np.argsort(position, kind="stable")]
    return (shuffled[:, None] + images * np.arange(repeats)).reshape(-1)[: len(rows)]


@dataclass(frozen=True, eq=False)
class Batches(Dataset):
    """Item b is the rank's part of global batch b, decoded and mixed, or the UsageError that its reading raised."""

    data: Streamed
    order: np.ndarray
    batch_size: int
    view: View
    seed: int = 0
    epoch: int = 0
    recipe: Batching | None = None  # None = evaluation
    shard: Shard = WHOLE

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def numbers(self, b: int) -> np.ndarray:
        """The samples of global batch b: first views, then second views..., so that neighbours are different images."""
        numbers = self.order[b * self.batch_size : (b + 1) * self.batch_size]
        return numbers[np.argsort(numbers // len(self.data), kind="stable")]

    def __getitem__(self, b: int) -> Batch | UsageError:
        try:
            return self.part(self.numbers(b))
        except UsageError as fault:  # raised where the batch is wanted: from a worker it would come with a traceback
            return fault

    def part(self, numbers: np.ndarray) -> Batch:
        """The rank's images of one global batch. If a shard boundary splits a pair, both ranks decode both images."""
        own, weight = self.shard.part(np.arange(len(numbers)))
        mixed = self.recipe is not None and (self.recipe.mixup > 0 or self.recipe.cutmix > 0)
        # Whole pairs, 2k and 2k + 1, where images are mixed.
        first, last = (own[0] // 2 * 2, min(own[-1] // 2 * 2 + 2, len(numbers))) if mixed else (own[0], own[-1] + 1)
        numbers, own = numbers[first:last], slice(own[0] - first, own[-1] + 1 - first)
        flip = self.recipe is not None and self.recipe.flip
        flipped = (draws.uniform(self.seed, "flip", self.epoch, numbers)[:, 0] < 0.5) & flip
        images, views = zip(*map(self.sample, numbers.tolist(), flipped.tolist()), strict=True)
        images, targets = torch.stack(images), self.data.labels[torch.from_numpy(numbers % len(self.data))]
        if mixed:
            images, targets = self.mix(images, targets, numbers)
        view = None if views[0] is None else torch.stack(views)[own]
        flipped = torch.from_numpy(flipped)[own]
        return Batch(images[own], targets[own], numbers[own], flipped, self.epoch, weight=weight, view=view)

    def sample(self, number: int, flipped: bool) -> tuple[Tensor, Tensor | None]:
        image = decode(self.data.found.rows, number % len(self.data))
        return self.view(image, flipped, draws.key(self.seed, "augment", self.epoch, number))

    def mix(self, images: Tensor, labels: Tensor, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Neighbours mixed in pairs: (B, 3, S, S), int64 (B,) -> the same shape, soft labels float (B, classes).

        A pair has one weight, and one box under cutmix; with both switched on, half of the pairs are cut. timm's Mixup
        pairs by position in a process's batch.
        """
        targets = one_hot(labels, len(self.data.classes))
        for k in range(0, len(labels) - 1, 2):
            pair = slice(k, k + 2)
            with own_draws(self.seed, "mix", self.epoch, int(numbers[k])):
                images[pair], share = mix_pair(images[pair], self.recipe.mixup, self.recipe.cutmix)
            targets[pair] = mixup_target(labels[pair], len(self.data.classes), share)
        return images, targets


def mix_pair(pair: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, float]:
    """(2, 3, S, S) -> each with a share of the other, and the share that is its own. Draws from numpy's generator."""
    cut = cutmix > 0 and (mixup <= 0 or np.random.random() < 0.5)  # noqa: NPY002  as timm's box does
    share = float(np.random.beta(cutmix, cutmix) if cut else np.random.beta(mixup, mixup))  # noqa: NPY002
    other = pair.flip(0)
    if not cut:
        return pair * share + other * (1 - share), share
    (top, bottom, left, right), share = cutmix_bbox_and_lam(pair.shape, share)
    mixed = pair.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, float(share)


def _load(batches: Batches, skip: int = 0) -> Iterator[Batch]:
    """Batches in order; each worker process is two ahead. Workers live for an epoch, whose order they hold.

    Where this process computes on a GPU, a batch waits in pinned memory, from which it is copied beside the computation.
    """
    loader = DataLoader(
        batches, batch_size=None, sampler=range(skip, len(batches)), num_workers=_workers(batches),
        pin_memory=torch.cuda.is_initialized(),
        generator=torch.Generator(),  # or the loader would draw from torch's global generator
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, UsageError):
            raise batch
        yield batch


def _workers(batches: Batches) -> int:
    """As many as asked for; none, with a warning, where their batches do not fit into shared memory: they would hang."""
    workers, images = batches.data.workers, math.ceil(batches.batch_size / batches.shard.world)
    needed = 2 * workers * images * 3 * 4 * batches.data.image_size**2  # each is two batches ahead, in float32
    if workers and os.path.isdir(SHARED) and (free := shutil.disk_usage(SHARED).free) < needed:
        said = f"{SHARED} has {free / 2**20:,.0f} MB, {workers} processes that read images need {needed / 2**20:,.0f}"
        warnings.warn(f"{said} (docker run --shm-size): images are read in this process", stacklevel=3)
        return 0
    return workers
