"""Losses of supervised training and fine-tuning; masked pre-training brings its own (`masked.py`)."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.data import Batch, DataSet
from vitlib.model import ViT, set_execution
from vitlib.train import loop
from vitlib.train.engine import CPU, Engine
from vitlib.train.protocol import LossFunction, Protocol, Setting
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


def start(setting: Setting) -> tuple[ViT, LossFunction]:
    """A model with fresh weights, and its recipe's loss."""
    return set_execution(ViT(setting.model, setting.seed), setting.execution), loss_of(setting.recipe)


def evaluate(model: torch.nn.Module, data: DataSet, engine: Engine = CPU) -> tuple[dict[str, float], np.ndarray]:
    """Top-1 accuracy in percent and mean cross entropy, and which images are classified correctly."""
    correct, loss = loop.evaluate(model, data, engine=engine)
    return {"top1": 100 * float(correct.mean()), "loss": loss}, correct


PROTOCOL = Protocol("supervised", start, evaluate)
