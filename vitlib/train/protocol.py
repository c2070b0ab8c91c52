"""What a training protocol is: how its model starts, what its loss is, how the trained model is evaluated.

Each protocol is beside its training code: `supervised.PROTOCOL`, `finetune.PROTOCOL`, `masked.PROTOCOL`,
`dvae.PROTOCOL`. The loop (`loop.train`) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitlib.data import Batch, DataSet
from vitlib.model import ViTConfig
from vitlib.train.engine import Engine

State = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch, Tensor | None], Tensor]  # (model, batch, drop-path draws) -> scalar


@dataclass(frozen=True)
class Protocol:
    """One way to train. What it needs and gives is said by attributes, so that nobody asks for its name."""

    name: str
    # The model and its loss, from the run's record (`RunSpec` of lab), the training images, which are opened, the weights that
    # it starts from, which are read, and its tokenizer, which is trained.
    start: Callable[[Any, DataSet, State | None, nn.Module | None], tuple[nn.Module, LossFunction]]
    # Metrics of the trained model, and which images of the split are classified correctly, bool (N,).
    evaluate: Callable[[nn.Module, DataSet, Engine], tuple[dict[str, float], np.ndarray | None]]
    config: type = ViTConfig  # of its models
    classifies: bool = True
    needs_parent: bool = False  # or weights that no run trained
    # The part of the model whose weights later runs start from.
    keeps: Callable[[nn.Module], nn.Module] = lambda model: model
    # The other weights, which predict in pre-training alone: kept too, in a file of their own.
    predictor: Callable[[nn.Module], State] = lambda model: {}
