"""Every number of a training run in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vitlib.data.augment import Augment
from vitlib.errors import UsageError, unknown

OPTIMIZERS = ("adamw", "lamb", "sgd")  # timm's names; sgd has Nesterov momentum 0.9


LOSSES = ("cross_entropy", "bce")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. A change of any field is another run."""

    epochs: int
    batch_size: int
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
    # What follows is for images that are read as they are needed (`data/images.py`); off for those held as one tensor.
    augment: Augment | None = None  # crops and colours; None = `flip` alone
    cutmix: float = 0.0  # alpha; with mixup too, each pair of images takes one of the two, half-half
    smoothing: float = 0.0  # label smoothing; cross entropy only
    repeats: int = 1  # repeated augmentation: so many views of an image in an epoch, of a `repeats`-th of the images
    ema: float | None = None  # decay of an exponential moving average of the weights, evaluated beside them

    def __post_init__(self) -> None:
        for field, allowed in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
            if getattr(self, field) not in allowed:
                raise unknown(field, getattr(self, field), allowed)
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay is {self.layer_decay!r}: allowed are None (off) or a factor in (0, 1]")
        if self.smoothing and self.loss == "bce":  # Released code: targets.gt(0) would make every class positive
            raise UsageError(f"smoothing is {self.smoothing!r} with loss 'bce': allowed is 0, or cross_entropy")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"ema is {self.ema!r}: allowed are None (off) or a decay in (0, 1)")
        if min(self.mixup, self.cutmix) < 0 or not 0 <= self.smoothing < 1 or self.repeats < 1:
            wrong = {name: getattr(self, name) for name in ("mixup", "cutmix", "smoothing", "repeats")}
            raise UsageError(f"a recipe needs mixup and cutmix from 0, smoothing in [0, 1) and repeats from 1: {wrong}")
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0 or not 0 <= self.warmup < 1:
            wrong = {f.name: getattr(self, f.name) for f in fields(self)[:3]} | {"warmup": self.warmup}
            raise UsageError(f"a recipe needs epochs and batch_size from 1, lr above 0 and warmup in [0, 1): {wrong}")
