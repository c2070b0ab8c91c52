"""Low-rank adapters on attention (LoRA, Hu et al. 2021), by peft: what `compare` sets beside the strategies."""

from __future__ import annotations

import copy

from torch import nn

from vitlib.data.augment import own_draws
from vitlib.errors import need
from vitlib.train.finetune import freeze

RANK = 8
ADAPTED = r"layers\.\d+\.mhsa\.\d+\.f\.(qkv|proj)"  # of every branch


def add_adapters(model: nn.Module, seed: int) -> None:
    """Train adapters, the head and the positions; the adapters add nothing at first. Raises UsageError without peft."""
    need("peft", "lora")
    from peft import LoraConfig, inject_adapter_in_model

    trained = freeze(model, "head")
    with own_draws("lora", seed):
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED), model)
    for name in trained:  # peft has frozen them
        model.get_parameter(name).requires_grad = True


def merged(model: nn.Module) -> nn.Module:
    """A copy whose matrices have their adapters added; a model without adapters itself."""
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    model = copy.deepcopy(model) if adapted else model
    for name in adapted:
        layer = model.get_submodule(name)
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    return model
