"""Real images: held in one tensor (`registry.py`) or read from their files as they are needed (`images.py`).

Both kinds give the same two streams of batches; which one serves is decided here, by the kind of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from vitlib.data import memory
from vitlib.data.augment import Augment
from vitlib.data.memory import WHOLE, Batch, DataSet, Shard, normalise, resize, subset
from vitlib.errors import UsageError

if TYPE_CHECKING:
    from vitlib.data.stream import Images

__all__ = [
    "Batch", "DataSet", "Shard", "epoch_batches", "evaluation_batches", "normalise", "resize", "subset",
]  # fmt: skip


def epoch_batches(
    data: DataSet | Images, rows: np.ndarray, seed: int, epoch: int, batch_size: int, flip: bool, mixup: float,
    augment: Augment | None = None, cutmix: float = 0.0, repeats: int = 1, shard: Shard = WHOLE, skip: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """One epoch's global batches in its order, of each the part of `shard`, without the first `skip`.

    augment, cutmix, repeats: see `train.recipes.Recipe`; they are for images that are read as they are needed. Raises
    UsageError where images in memory should get them.
    """
    if isinstance(data, DataSet):
        if augment is not None or cutmix or repeats != 1:
            raise UsageError(
                f"{data.name} is held in memory as one tensor: cutmix and repeats need a recipe with `augment`, which reads "
                "images from their files"
            )
        return memory.epoch_batches(data, rows, seed, epoch, batch_size, flip, mixup, shard, skip)
    from vitlib.data import stream

    return stream.epoch_batches(data, rows, seed, epoch, batch_size, flip, mixup, augment, cutmix, repeats, shard, skip)


def evaluation_batches(data: DataSet | Images, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
    """The split in its order, of which a process gets the part of `shard`; targets are labels."""
    if isinstance(data, DataSet):
        return memory.evaluation_batches(data, batch_size, shard)
    from vitlib.data import stream

    return stream.evaluation_batches(data, batch_size, shard)
