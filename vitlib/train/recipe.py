"""Every number of a training run in one frozen record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from vitlib.data.augment import Augment
from vitlib.errors import UsageError, unknown

OPTIMIZERS = ("adamw", "lamb", "sgd")  # timm's names; sgd has Nesterov momentum 0.9
LOSSES = ("cross_entropy", "bce")


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(least: float, below: float = math.inf) -> Callable[[object], bool]:
    """Numbers from `least` that are less than `below`; neither infinite nor NaN."""
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below


def _or_none(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or holds(value)


ABOVE_ZERO, ABOVE_ONE = math.ulp(0.0), math.nextafter(1, 2)  # the next number after 0, after 1
ALLOWED = {  # field -> which values, in words and as a test
    "epochs": ("whole numbers from 1", _count),
    "batch_size": ("whole numbers from 1", _count),
    "lr": ("numbers above 0", _number(ABOVE_ZERO)),
    "weight_decay": ("numbers from 0", _number(0)),
    "betas": ("two numbers in [0, 1)", lambda b: isinstance(b, tuple) and len(b) == 2 and all(map(_number(0, 1), b))),
    "min_lr": ("numbers from 0", _number(0)),
    "warmup": ("shares in [0, 1)", _number(0, 1)),
    "clip": ("None (off) or numbers above 0", _or_none(_number(ABOVE_ZERO))),
    "flip": ("True and False", lambda value: isinstance(value, bool)),
    "mixup": ("numbers from 0", _number(0)),
    "layer_decay": ("None (off) or factors in (0, 1]", _or_none(_number(ABOVE_ZERO, ABOVE_ONE))),
    "cutmix": ("numbers from 0", _number(0)),
    "smoothing": ("shares in [0, 1)", _number(0, 1)),
    "repeats": ("whole numbers from 1", _count),
    "ema": ("None (off) or decays in (0, 1)", _or_none(_number(ABOVE_ZERO, 1))),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. A change of any field is another run. Raises UsageError for values that cannot be."""

    epochs: int
    batch_size: int  # images of all processes together
    lr: float  # the peak, not scaled by the batch
    optimizer: str = "adamw"
    weight_decay: float = 0.05  # on matrices only: none on biases, norms, gammas, class token and positions
    betas: tuple[float, float] = (0.9, 0.999)
    min_lr: float = 1e-5
    warmup: float = 0.1  # share of the steps
    clip: float | None = 1.0  # norm of all gradients together
    loss: str = "cross_entropy"  # "bce": procedure A2, targets binarised after mixup
    flip: bool = True
    mixup: float = 0.0  # alpha; 0 = off
    # Fine-tuning by BEiT's protocol: the rate falls by this factor from each layer of a 12-layer model to the one below;
    # other depths take the factor that gives their stem the same rate (`loop.layer_decay`). None = one rate for all.
    layer_decay: float | None = None
    # The rest needs images that are decoded one by one (`data/stream.py`), except for smoothing and ema.
    augment: Augment | None = None  # crops and colours; None = `flip` alone
    cutmix: float = 0.0  # alpha; with mixup too, each pair of images takes one of the two, half-half
    smoothing: float = 0.0  # label smoothing; cross entropy only
    repeats: int = 1  # repeated augmentation: views per image in an epoch, of 1 / repeats of the images
    ema: float | None = None  # decay of an exponential moving average of the weights, evaluated beside them

    def __post_init__(self) -> None:
        for field, allowed in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
            if getattr(self, field) not in allowed:
                raise unknown(field, getattr(self, field), allowed)
        for field, (words, holds) in ALLOWED.items():
            if not holds(value := getattr(self, field)):
                raise UsageError(f"{field} is {value!r}: allowed are {words}")
        if self.smoothing and self.loss == "bce":  # Released code: targets.gt(0) would make every class positive
            raise UsageError(f"smoothing is {self.smoothing!r} with loss 'bce': allowed is 0, or cross_entropy")
