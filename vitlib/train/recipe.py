"""Every number of a training run in one frozen record."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from vitlib.data.augment import Augment
from vitlib.errors import UsageError
from vitlib.records import ABOVE_0, check, floats, number, or_none, truth, two, whole

CHOICES = {
    "optimizer": ("adamw", "lamb", "sgd"),  # timm's names; sgd has Nesterov momentum 0.9
    "loss": ("cross_entropy", "bce"),
}
AFTER_1 = math.nextafter(1, 2)
RULES = [
    ("epochs batch_size repeats", whole(1, sys.maxsize), "are whole numbers from 1"),
    ("lr", number(ABOVE_0), "are numbers above 0"),
    ("clip", or_none(number(ABOVE_0)), "are None (off) or numbers above 0"),
    ("weight_decay min_lr mixup cutmix", number(0), "are numbers from 0"),
    ("warmup smoothing", number(0, 1), "are shares in [0, 1)"),
    ("layer_decay", or_none(number(ABOVE_0, AFTER_1)), "are None (off) or factors in (0, 1]"),
    ("ema", or_none(number(ABOVE_0, 1)), "are None (off) or decays in (0, 1)"),
    ("betas", two(number(0, 1)), "are two numbers in [0, 1)"),
    ("flip", truth, "are True and False"),
]


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
        check(self, CHOICES, RULES)
        if self.smoothing and self.loss == "bce":  # Released code: targets.gt(0) would make every class positive
            raise UsageError(f"smoothing is {self.smoothing!r} with loss 'bce': allowed is 0, or cross_entropy")
