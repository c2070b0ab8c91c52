"""What a training protocol is: how its model starts, what its loss is, how the trained model is evaluated.

Each protocol is beside its training code: `supervised.PROTOCOL`, `finetune.PROTOCOL`, `masked.PROTOCOL`,
`dvae.PROTOCOL`. The loop (`loop.train`) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from vitlib.data import Batch, DataSet
from vitlib.model import ViTConfig
from vitlib.train.engine import Engine
from vitlib.train.recipe import Recipe

LossFunction = Callable[[nn.Module, Batch, Tensor | None], Tensor]  # (model, batch, drop-path draws) -> scalar


@dataclass(frozen=True, eq=False)
class Setting:
    """Everything that a run starts from, as objects: data is opened, weights are read, a tokenizer is trained."""

    model: ViTConfig  # of a tokenizer: DVAEConfig
    recipe: Recipe
    seed: int
    data: DataSet  # training images
    steps: int
    weights: dict[str, Tensor] | None = None  # of the pretrained backbone; fine-tuning alone has them
    new_head: bool = False  # the backbone's classes are others
    strategy: str = "full"  # which parameters fine-tuning trains
    targets: str = "none"  # what masked pre-training predicts
    tokenizer: nn.Module | None = None  # for targets "dvae": trained, in eval mode
    masked: int = 0  # patches masked per image
    blank: bool = False  # masked patches are blanked in the pixels too, before the stem
    execution: str = "seq"  # of parallel branches
    device: str = "cpu"


@dataclass(frozen=True)
class Protocol:
    """One way to train. What it needs and gives is said by attributes, so that nobody asks for its name."""

    name: str
    start: Callable[[Setting], tuple[nn.Module, LossFunction]]
    # Metrics of the trained model, and which images of the split are classified correctly, bool (N,).
    evaluate: Callable[[nn.Module, DataSet, Engine], tuple[dict[str, float], np.ndarray | None]]
    config: type = ViTConfig  # of its models
    classifies: bool = True
    needs_parent: bool = False
    # The part of the model whose weights later runs start from.
    keeps: Callable[[nn.Module], nn.Module] = lambda model: model
