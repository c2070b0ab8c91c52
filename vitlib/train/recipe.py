"""Every number of a training run in one frozen record."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from vitlib.data.augment import Augment
from vitlib.errors import UsageError, unknown
from vitlib.records import floats

OPTIMIZERS = ("adamw", "lamb", "sgd")  # timm's names; sgd has Nesterov momentum 0.9
LOSSES = ("cross_entropy", "bce")


def _number(least: float, below: float = sys.float_info.max, kind: type = float) -> Callable[[object], bool]:
    """Numbers from `least` and less than `below`: neither infinite nor NaN."""
    return lambda v: isinstance(v, (int, kind)) and not isinstance(v, bool) and least <= v < below


AFTER_0, AFTER_1 = sys.float_info.min, math.nextafter(1, 2)  # no denormal number: runs flush those to 0
RULES = (  # fields, which values are allowed, in words and as a test; None too where that is the field's default
    ("epochs batch_size repeats", "whole numbers from 1", _number(1, kind=int)),
    ("lr clip", "numbers above 0", _number(AFTER_0)),
    ("weight_decay min_lr mixup cutmix", "numbers from 0", _number(0)),
    ("warmup smoothing", "shares in [0, 1)", _number(0, 1)),
    ("layer_decay", "factors in (0, 1]", _number(AFTER_0, AFTER_1)),
    ("ema", "decays in (0, 1)", _number(AFTER_0, 1)),
    ("betas", "two numbers in [0, 1)", lambda b: isinstance(b, tuple) and len(b) == 2 and all(map(_number(0, 1), b))),
    ("flip", "True and False", lambda value: isinstance(value, bool)),
)
OPTIONAL = ("clip", "layer_decay", "ema")


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
        floats(self)
        for field, allowed in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
            if getattr(self, field) not in allowed:
                raise unknown(field, getattr(self, field), allowed)
        for names, words, holds in RULES:
            for field in names.split():
                value, off = getattr(self, field), "None (off) or " * (field in OPTIONAL)
                if not (holds(value) or (off and value is None)):
                    raise UsageError(f"{field} is {value!r}: allowed are {off}{words}")
        if self.smoothing and self.loss == "bce":  # Released code: targets.gt(0) would make every class positive
            raise UsageError(f"smoothing is {self.smoothing!r} with loss 'bce': allowed is 0, or cross_entropy")
