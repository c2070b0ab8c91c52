"""Thing 1 on trained weights: a sequential model in parallel branches and back, and how far eq. (2) is from eq. (1).

The paper assumes that r'(x + r(x)) is close to r'(x) for residual functions r and r' that follow each other, and trains both
forms from the start. `regroup` puts the weights of one form into the other; `commutation_gap` measures the assumption.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitlib.errors import UsageError
from vitlib.model.parallel import ParallelLayer
from vitlib.model.vit import ViT

LAYER = re.compile(r"layers\.(\d+)\.(mhsa|ffn)\.(\d+)\.")


def regroup(model: ViT, branches: int) -> ViT:
    """A model with the same pairs in layers of so many branches, and weights of its own: pair l K + k is branch k of layer l.

    Regrouping back gives the first model. Raises UsageError where the pairs cannot be shared equally.
    """
    pairs = model.config.pairs
    if type(branches) is not int or branches < 1 or pairs % branches:
        raise UsageError(
            f"{pairs} pairs cannot be regrouped into layers of {branches!r} branches: allowed are its divisors"
        )
    model = copy.deepcopy(model)
    old, execution = list(model.layers), model.layers[0].execution
    model.config = replace(model.config, depth=pairs // branches, branches=branches)
    mhsa, ffn = ([r for layer in old for r in getattr(layer, part)] for part in ("mhsa", "ffn"))
    with torch.device("meta"):  # no initial values: every branch is replaced
        layers = [ParallelLayer(model.config) for _ in range(model.config.depth)]
    for i, layer in enumerate(layers):
        own = slice(i * branches, (i + 1) * branches)
        layer.mhsa, layer.ffn = nn.ModuleList(mhsa[own]), nn.ModuleList(ffn[own])
        layer.execution = execution
    model.layers = nn.ModuleList(layers).train(model.training)
    return model


def regrouped(state: dict[str, Tensor], branches: int) -> dict[str, Tensor]:
    """The same for a model's state: names change, tensors do not. A state without layers stays as it is."""
    found = [(name, LAYER.match(name)) for name in state]
    before = max((int(m[3]) + 1 for _, m in found if m), default=1)

    def renamed(name: str, m: re.Match | None) -> str:
        if m is None:
            return name
        layer, branch = divmod(int(m[1]) * before + int(m[3]), branches)
        return f"layers.{layer}.{m[2]}.{branch}.{name[m.end() :]}"

    return {renamed(name, m): state[name] for name, m in found}


@torch.no_grad()
def commutation_gap(model: ViT, images: Tensor) -> dict[str, Tensor]:
    """|r'(y) - r'(x)| / |r'(x)| for the MHSA and the FFN of every layer but the first: {"mhsa": (L - 1,), "ffn": (L - 1,)}.

    x is what that part of the layer before reads, which r' would read in eq. (2); y is what r' reads in eq. (1). Norms are over
    all images, tokens and channels; 0 would make both forms equal. Raises UsageError for a model of more than one branch.
    """
    if model.config.branches != 1:
        raise UsageError(f"the gap is that of a sequential model, not of {model.config.name}: regroup(model, 1)")
    was, whole = model.training, model.skip_unread
    model.eval()
    reads: dict[str, list[Tensor]] = {"mhsa": [], "ffn": []}
    parts = [(part, getattr(layer, part)[0]) for layer in model.layers for part in reads]
    hooks = [
        r.register_forward_pre_hook(lambda _, given, part=part: reads[part].append(given[0])) for part, r in parts
    ]  # fmt: skip
    try:
        model.skip_unread = False
        model.encode(model.embed(images))
    finally:
        model.skip_unread = whole
        for hook in hooks:
            hook.remove()
    gaps = {part: [] for part in reads}
    for part, seen in reads.items():
        functions = [getattr(layer, part)[0] for layer in model.layers]
        for r, x, y in zip(functions[1:], seen, seen[1:], strict=False):
            there = r(x)
            gaps[part].append((r(y) - there).norm() / there.norm())
    model.train(was)
    return {part: torch.stack(values) for part, values in gaps.items()}
