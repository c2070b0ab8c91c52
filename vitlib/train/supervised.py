"""Losses and evaluation of supervised training and fine-tuning; masked pre-training brings a loss of its own (`masked.py`)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.data import Batch, DataSet
from vitlib.model import ViT, set_execution
from vitlib.train.engine import CPU, Engine
from vitlib.train.protocol import LossFunction, Protocol
from vitlib.train.recipe import Recipe


def cross_entropy(model: torch.nn.Module, batch: Batch, draws: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Mean over images; targets are labels, or soft labels under mixup and cutmix; `smoothing` is spread over all classes."""
    return F.cross_entropy(model(batch.images, draws), batch.targets, label_smoothing=smoothing)


def bce(model: torch.nn.Module, batch: Batch, draws: Tensor | None = None) -> Tensor:
    """Procedure A2: one binary decision per class, mean over images and classes.

    Released code: engine.py, targets.gt(0.0). Any share above zero counts as fully positive; label smoothing is
    off (`Recipe` refuses it), or every class would.
    """
    logits = model(batch.images, draws)
    targets = batch.targets if batch.targets.ndim == 2 else F.one_hot(batch.targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))


def loss_of(recipe: Recipe) -> LossFunction:
    """The loss function of supervised training and fine-tuning."""
    return bce if recipe.loss == "bce" else functools.partial(cross_entropy, smoothing=recipe.smoothing)


def start(spec: Any, *_: object) -> tuple[ViT, LossFunction]:
    """A model with fresh weights, and its recipe's loss."""
    return set_execution(ViT(spec.model, spec.seed), spec.execution), loss_of(spec.recipe)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, data: DataSet, engine: Engine = CPU, batch_size: int = 500
) -> tuple[dict[str, float], np.ndarray]:
    """Top-1 accuracy in percent and mean cross entropy; which images are correctly classified, bool (N,) in the split's order.

    Every process classifies its part, and all know the whole.
    """
    model.eval()
    correct, total = [np.zeros(0, bool)], 0.0
    for batch in data.evaluation_batches(batch_size, engine.shard):
        batch = engine.move(batch)
        # images (B, C, H, W) -> logits (B, classes)
        with engine.forward():
            logits = model(batch.images)
        # right or wrong for each image, and the sum of the losses
        correct.append((logits.argmax(dim=1) == batch.targets).cpu().numpy())
        total += F.cross_entropy(logits.float(), batch.targets, reduction="sum").item()
    # all processes' parts in order
    everyones = engine.gather((np.concatenate(correct), total))
    whole = np.concatenate([correct for correct, _ in everyones])
    return {"top1": 100 * float(whole.mean()), "loss": sum(total for _, total in everyones) / len(data)}, whole


PROTOCOL = Protocol("supervised", start, evaluate)
