"""Thing 1 on trained weights: a sequential model in parallel branches and back, and how far eq. (2) is from eq. (1).

The paper assumes that r'(x + r(x)) is close to r'(x) for residual functions r and r' that follow each other, and trains both
forms from the start. `regroup` puts the weights of one form into the other; `commutation_gap` measures the assumption.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import torch
from torch import Tensor

from vitlib.errors import UsageError
from vitlib.model.parallel import set_execution
from vitlib.model.vit import ViT
from vitlib.model.weights import assemble, state_of

LAYER = re.compile(r"layers\.(\d+)\.(mhsa|ffn)\.(\d+)\.")


def regroup(model: ViT, branches: int) -> ViT:
    """A model with the same pairs in layers of so many branches, and weights of its own: pair l K + k is branch k of layer l.

    Regrouping back gives the first model. Raises UsageError where the pairs cannot be shared equally, and as `state_of`.
    """
    state = {name: tensor.clone() for name, tensor in state_of(model, "regrouped").items()}
    pairs = model.config.pairs
    if type(branches) is not int or branches < 1 or pairs % branches:
        raise UsageError(
            f"{pairs} pairs cannot be regrouped into layers of {branches!r} branches: allowed are its divisors"
        )
    config = replace(model.config, depth=pairs // branches, branches=branches)
    there = assemble(config, regrouped(state, branches), "this model")
    return set_execution(there, model.layers[0].execution).train(model.training)


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
    was = model.training
    reads = model.eval().reads()
    x, before = model.tokens(model.embed(images)), {}
    gaps: dict[str, list[Tensor]] = {"mhsa": [], "ffn": []}
    for layer in model.layers:
        for part, of_part in gaps.items():
            r = functools.partial(getattr(layer, part)[0], reads=reads if part == "mhsa" else None)
            y = r(x)
            if part in before:
                there = r(before[part])
                of_part.append((y - there).norm() / there.norm())
            before[part], x = x, x + y  # eq. (1)
    model.train(was)
    return {part: torch.stack(values) for part, values in gaps.items()}
