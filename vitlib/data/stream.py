"""Images that are read as they are needed, and the batches of an epoch: for data that does not fit into one tensor.

`open_images(...)` finds a split and its labels (`readers.py`); `epoch_batches` and `evaluation_batches` decode and augment
(`views.py`) in worker processes, batch by batch. The order of an epoch, its global batches, its pairs for mixup and cutmix
are functions of (seed, epoch), every other draw of (seed, epoch, image, repeat): no number of workers or processes, and no
resumption in the middle of an epoch, changes a pixel.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target, one_hot
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lab.data import readers
from vitlib import draws
from vitlib.data.augment import Augment, TestView, TrainView, own_draws
from vitlib.data.memory import Batch, Shard
from vitlib.data.read import Found, Rows, decode, unreadable
from vitlib.errors import UsageError

WHOLE = Shard()
View = Callable[[Image.Image, bool, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Images:
    """One split on disk. `labels` int64 (N,) are at hand, an image is decoded when a batch asks for it and then forgotten."""

    name: str
    split: str
    labels: Tensor
    classes: tuple[str, ...]
    mean: Tensor  # float32 (3, 1, 1), of pixels / 255
    std: Tensor
    image_size: int
    rows: Rows
    augment: Augment  # its `test_crop` and `interpolation` are those of evaluation
    workers: int = 0  # processes that decode; 0 = this one
    skipped: tuple[str, ...] = ()  # images left out because they cannot be read

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def checksum(self) -> str:
        """Over names, sizes and labels: `rows.Found.checksum`. Asks for the size of every file when it is first wanted."""
        return Found(self.rows, self.labels.numpy(), self.classes).checksum()

    def take(self, index: np.ndarray | Tensor) -> Images:
        """The same data set with these images only, in this order: to hold some of them out, for example."""
        index = np.asarray(index)
        return replace(self, rows=self.rows.take(index), labels=self.labels[torch.from_numpy(index)])

    def view(self, augment: Augment | None) -> View:
        """What is done to a decoded image: `augment`'s training view, or the test view for None."""
        kind = TestView if augment is None else TrainView
        mean, std = (tuple(channel.flatten().tolist()) for channel in (self.mean, self.std))
        return kind(augment or self.augment, self.image_size, mean, std)


def open_images(
    name: str, split: str, image_size: int, *, root: Path | str | None = None, augment: Augment | None = None,
    num_classes: int | None = None, check_counts: bool = True, skip_unreadable: bool = False, workers: int = 0,
    cache_dir: Path | str | None = None, mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Images:  # fmt: skip
    """A split of the data set in the folder `<root>/<name>` (root: VITLIB_DATA, else data/), or of a Hub name.

    The layout is found by looking at the folder. `num_classes` is what the caller's model has; `check_counts` compares the
    paper's data sets with Table 9; `cache_dir` is where `datasets` keeps its Arrow files. `skip_unreadable` decodes every
    image once beforehand, which takes about as long as a third of an epoch, and leaves out those that cannot be read, with a
    warning that counts them and names the first: N, the order and the checksum are then those of the remaining images.

    Raises UsageError for a folder or a split that is not there, an unknown layout, an empty class folder, a count that
    differs, and, here with `skip_unreadable` if nothing is left, later without, for an image that cannot be read.
    """
    found = readers.find(name, split, root, cache_dir)
    if check_counts:
        readers.check_counts(name, split, found)
    if num_classes not in (None, len(found.classes)):
        raise UsageError(f"{name} {split} has {len(found.classes)} classes, {num_classes} are expected")
    found, skipped = _readable(f"{name} {split}", found, workers) if skip_unreadable else (found, ())
    statistics = (torch.tensor(s, dtype=torch.float32).view(-1, 1, 1) for s in (mean, std))
    return Images(
        name, split, torch.from_numpy(found.labels), found.classes, *statistics, image_size, found.rows, augment or Augment(),
        workers, skipped,
    )  # fmt: skip


def _readable(what: str, found: Found, workers: int) -> tuple[Found, tuple[str, ...]]:
    """Without the images that cannot be read, and their names."""
    faulty = unreadable(found.rows, workers)
    if len(faulty) == len(found.labels):
        raise UsageError(f"none of the {len(faulty)} images of {what} can be read")
    names = tuple(found.rows.name(i) for i in faulty)
    if names:
        warnings.warn(
            f"{len(names)} of {len(found.labels)} images of {what} cannot be read and are left out, the first is {names[0]}",
            stacklevel=3,
        )
    return found.take(np.setdiff1d(np.arange(len(found.labels)), faulty)), names


# ------------------------------------------------------------------------------------------------- batches


def epoch_batches(
    data: Images, rows: np.ndarray, seed: int, epoch: int, batch_size: int, flip: bool = True, mixup: float = 0.0,
    augment: Augment | None = None, cutmix: float = 0.0, repeats: int = 1, shard: Shard = WHOLE, skip: int = 0,
    workers: int | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's part of every global batch of `batch_size` images; the last batch may be smaller.

    An epoch has as many samples as `rows` has images, n. With repeated augmentation these are ceil(n / repeats) different
    images, `repeats` views of each (of the last one what is left of n), all of them in the same global batch or two
    neighbouring ones. Released code: orders by epoch alone and keeps n // 256 * 256 samples, none of a set below 256; here
    seed and epoch decide, and every n works.

    augment: None = the test view, flipped. mixup, cutmix: alpha of the Beta distribution, 0 = off. Images 2k and 2k + 1 of a
    global batch are mixed with each other, an odd last one stays as it is. skip: so many global batches at the start are
    left out, without decoding them. workers: processes that decode, None = `data.workers`.

    `Batch.index` is the image's number in the split + len(data) * its repeat, so that the views of an image have draws of
    their own. Raises UsageError for an image that cannot be read.
    """
    order = epoch_order(len(data), rows, seed, epoch, repeats)
    batches = Batches(data, order, batch_size, data.view(augment), seed, epoch, flip, mixup, cutmix, shard)
    yield from _load(batches, skip, data.workers if workers is None else workers)


def evaluation_batches(
    data: Images, batch_size: int, shard: Shard = WHOLE, workers: int | None = None
) -> Iterator[Batch]:
    """Every image once in the split's order, in the test view; a process gets a contiguous part of it, perhaps none."""
    batches = Batches(data, shard.own(np.arange(len(data))), batch_size, data.view(None))
    yield from _load(batches, 0, data.workers if workers is None else workers)


def epoch_order(images: int, rows: np.ndarray, seed: int, epoch: int, repeats: int) -> np.ndarray:
    """The epoch's samples, image + images * repeat: n = len(rows) of them, the views of an image side by side."""
    position = draws.uniform(seed, "order", epoch, rows)[:, 0]
    shuffled = rows[np.argsort(position, kind="stable")]
    return (shuffled[:, None] + images * np.arange(repeats)).reshape(-1)[: len(rows)]


@dataclass(frozen=True, eq=False)
class Batches(Dataset):
    """Item b is the rank's part of global batch b, decoded and mixed, or the UsageError that its reading raised."""

    data: Images
    order: np.ndarray
    batch_size: int
    view: View
    seed: int = 0
    epoch: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
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
        """The rank's images of one global batch. A pair that its border cuts is decoded on both sides."""
        own, weight = self.shard.part(np.arange(len(numbers)))
        mixed = self.mixup > 0 or self.cutmix > 0
        first, last = (own[0] // 2 * 2, min(own[-1] // 2 * 2 + 2, len(numbers))) if mixed else (own[0], own[-1] + 1)
        numbers, own = numbers[first:last], slice(own[0] - first, own[-1] + 1 - first)
        flipped = (draws.uniform(self.seed, "flip", self.epoch, numbers)[:, 0] < 0.5) & self.flip
        images, views = zip(*map(self.sample, numbers, flipped), strict=True)
        images, targets = torch.stack(images), self.data.labels[torch.from_numpy(numbers % len(self.data))]
        if mixed:
            images, targets = self.mix(images, targets, numbers)
        view = None if views[0] is None else torch.stack(views)[own]
        flipped = torch.from_numpy(flipped)[own]
        return Batch(images[own], targets[own], numbers[own], flipped, self.epoch, weight=weight, view=view)

    def sample(self, number: int, flipped: bool) -> tuple[Tensor, Tensor | None]:
        image = decode(self.data.rows, int(number) % len(self.data))
        return self.view(image, bool(flipped), draws.key(self.seed, "augment", self.epoch, int(number)))

    def mix(self, images: Tensor, labels: Tensor, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Neighbours mixed in pairs: (B, 3, H, W), int64 (B,) -> the same shape, shares of the classes float (B, classes).

        A pair has one weight, and one box under cutmix; with both switched on, half of the pairs are cut. timm's Mixup
        pairs by position in a process's batch.
        """
        targets = one_hot(labels, len(self.data.classes))
        for k in range(0, len(labels) - 1, 2):
            pair = slice(k, k + 2)
            with own_draws(self.seed, "mix", self.epoch, int(numbers[k])):
                images[pair], share = mix_pair(images[pair], self.mixup, self.cutmix)
            targets[pair] = mixup_target(labels[pair], len(self.data.classes), share)
        return images, targets


def mix_pair(pair: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, float]:
    """(2, 3, H, W) -> each with a share of the other, and the share that is its own. Draws from numpy's generator."""
    cut = cutmix > 0 and (mixup <= 0 or np.random.random() < 0.5)  # noqa: NPY002  as timm's box does
    share = float(np.random.beta(cutmix, cutmix) if cut else np.random.beta(mixup, mixup))  # noqa: NPY002
    other = pair.flip(0)
    if not cut:
        return pair * share + other * (1 - share), share
    (top, bottom, left, right), share = cutmix_bbox_and_lam(pair.shape, share)
    mixed = pair.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, float(share)


def _load(batches: Batches, skip: int, workers: int) -> Iterator[Batch]:
    """Batches in order; each of `workers` processes is two ahead. They live for an epoch, whose order they hold.

    Where this process computes on a GPU, a batch waits in pinned memory, from which it is copied beside the computation.
    """
    loader = DataLoader(
        batches, batch_size=None, sampler=range(skip, len(batches)), num_workers=workers, collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_initialized(),
        generator=torch.Generator(),  # or the loader would draw from torch's global generator
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, UsageError):
            raise batch
        yield batch


def _as_it_is(batch: Batch) -> Batch:
    return batch
