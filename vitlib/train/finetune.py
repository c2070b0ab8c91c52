"""Thing 2: what fine-tuning trains (section 4, Figure 4), and how it starts from a trunk.

strategy   trains
full       everything
attn       qkv and proj of every branch's attention, head, position embedding
ffn        fc1 and fc2 of every branch's feed-forward network, head, position embedding
head       head, position embedding

Paper: "MHSA weights", with padlocks on FFN, LayerNorms and patch projection in Figure 4. Released code: main.py
--attn-only keeps every name that contains `.attn.`, then head and pos_embed; the second branch of its parallel blocks
is called `attn1`, so that it trains half of their attention. Here a module's role counts, not its name, in our models
and in timm's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitlib.errors import UsageError, unknown
from vitlib.model import ViT, ViTConfig, resize_positions, set_execution
from vitlib.model.layers import FFN, MHSA
from vitlib.model.vit import RelativeBias
from vitlib.train import supervised
from vitlib.train.protocol import LossFunction, Protocol, Setting


def _roles() -> dict[str, tuple[type, ...]]:
    from timm.layers import Attention, Mlp

    return {"attn": (MHSA, Attention), "ffn": (FFN, Mlp), "head": ()}


STRATEGIES = ("full", "attn", "ffn", "head")


def trainable(model: nn.Module, strategy: str) -> list[str]:
    """The exact names of the parameters that a strategy trains, in the model's order.

    Raises UsageError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    names = [name for name, _ in model.named_parameters()]
    if strategy == "full":
        return names
    roles = _roles()[strategy]
    if roles and not any(isinstance(module, roles) for module in model.modules()):
        known = " and ".join(f"{role.__module__.split('.')[0]}'s {role.__name__}" for role in roles)
        raise UsageError(f"{type(model).__name__} has no {strategy} layers that can be told apart: known are {known}")
    kept = {"pos_embed"}
    for prefix, module in model.named_modules():
        if isinstance(module, (*roles, RelativeBias)) or module is model.head:
            kept.update(f"{prefix}.{name}" for name, _ in module.named_parameters())
    return [name for name in names if name in kept]


def freeze(model: nn.Module, strategy: str) -> list[str]:
    """Set `requires_grad` as the strategy says; the names that stay trainable."""
    kept = trainable(model, strategy)
    chosen = set(kept)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in chosen
    return kept


def start_from(weights: dict[str, Tensor], config: ViTConfig, seed: int, new_head: bool = False) -> ViT:
    """A model of `config` with a trunk's weights: positions resized to its grid, a fresh head where shapes differ.

    The trunk may be a classifier at another image size or with other classes, or a masked pre-trained model without
    a head. new_head: the head is fresh though its shape is the same, because the trunk's classes were others.
    Raises UsageError with the list of keys if anything else differs; nothing is loaded loosely.
    """
    model = ViT(config, seed)
    own = model.state_dict()
    weights = dict(weights)
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_positions(weights["pos_embed"], config.grid)
    if new_head or weights.get("head.weight", torch.empty(0)).shape != own["head.weight"].shape:
        weights |= {name: own[name] for name in ("head.weight", "head.bias")}
    differ = sorted(name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name))
    if differ:
        raise UsageError(f"the trunk does not fit {config.name}: {', '.join(differ)}; nothing was loaded")
    model.load_state_dict(weights)
    return model


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def at_image_size(config: ViTConfig, image_size: int) -> ViTConfig:
    """The same model for another resolution; checked."""
    return replace(config, image_size=image_size)


def start(setting: Setting) -> tuple[ViT, LossFunction]:
    """The backbone's weights with the strategy's parameters trainable, and the supervised loss of the recipe."""
    model = start_from(setting.weights, setting.model, setting.seed, setting.new_head)
    freeze(model, setting.strategy)
    return set_execution(model, setting.execution), supervised.loss_of(setting.recipe)


PROTOCOL = Protocol("finetune", start, supervised.evaluate, needs_parent=True)
