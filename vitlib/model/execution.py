"""How the branches of one model are processed: one after the other, at once, or fused for good.

seq    eq. (2) as written: one branch after the other (`parallel.py`); what the released code and timm do
par    at once: the branches' own tensors are laid side by side as the layer runs, so that K branches are one wide
       MHSA and one wide FFN. The same function with the same gradients up to rounding: a training path
fused  `fuse(model)`: laid side by side once, for inference and export

Why it is exact. All branches read the same x, so they share LayerNorm's normalisation, and its affine part belongs to
the matrix behind it; LayerScale belongs to the matrix in front of it; and a sum of matrix products is one product of
concatenated matrices. So 18x2 is an 18-layer ViT with twice the heads and a twice wider FFN, up to where the norm's
affine part is kept. (Paper, section 3: the sum of two branches; it does not say that they are one wide layer.)

K branches, B batch, N tokens, D width, F = 4D, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.errors import UsageError, unknown
from vitlib.model.layers import EPS, FFN, MHSA, Residual, attend

if TYPE_CHECKING:
    from vitlib.model.parallel import ParallelLayer
    from vitlib.model.vit import ViT

EXECUTIONS = ("seq", "par")


def set_execution(model: ViT, execution: str) -> ViT:
    """Choose how the branches of `model` are processed from now on, "seq" or "par"; the model itself.

    Raises UsageError for an unknown execution.
    """
    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    for layer in model.layers:
        layer.execution = execution
    return model


def par_layer(layer: ParallelLayer, x: Tensor, draws: Tensor | None, bias: Tensor | None) -> Tensor:
    """Eq. (2), all branches at once: (B, N, D) -> (B, N, D). `draws` (K, 2, B) as in `ParallelLayer`."""
    K, heads = len(layer.mhsa), layer.mhsa[0].f.heads
    wide_bias = None if bias is None else bias.repeat(K, 1, 1)
    x = x + _at_once(layer.mhsa, x, "qkv", "proj", lambda h: attend(h, K * heads, wide_bias), draws, 0)
    return x + _at_once(layer.ffn, x, "fc1", "fc2", F.gelu, draws, 1)


def _at_once(
    branches: nn.ModuleList, x: Tensor, first: str, last: str, between: Callable, draws: Tensor | None, part: int
) -> Tensor:
    """The sum of residual functions last(between(first(LayerNorm(x)))) as one wide function."""
    hidden = between(F.linear(F.layer_norm(x, x.shape[-1:], eps=EPS), *side_by_side_in(branches, first)))
    keep = _keep(branches[0], draws, part, x)
    weight, bias = side_by_side_out(branches, last)
    if keep is None:
        return F.linear(hidden, weight, bias.sum(0))
    # Stochastic depth: each branch and sample is kept or dropped on its own, bias included.
    hidden = hidden.unflatten(-1, (len(branches), -1)) * keep[:, None, :, None]
    return F.linear(hidden.flatten(-2), weight) + (keep @ bias)[:, None]


def _keep(branch: Residual, draws: Tensor | None, part: int, x: Tensor) -> Tensor | None:
    """0 or 1 / (1 - rate) for each sample and branch, (B, K); None where nothing is dropped."""
    if draws is None or not branch.training or branch.drop_path == 0:
        return None
    return ((draws[:, part] >= branch.drop_path).to(x.dtype) / (1 - branch.drop_path)).T


def side_by_side_in(branches: nn.ModuleList, name: str) -> tuple[Tensor, Tensor]:
    """First matrices with the norms' affine parts folded in: (K F, D) and (K F,); q, k, v stay outermost for qkv."""
    weight = torch.stack([getattr(b.f, name).weight for b in branches])
    scale = torch.stack([b.norm.weight for b in branches])
    shift = torch.stack([b.norm.bias for b in branches])
    bias = torch.stack([getattr(b.f, name).bias for b in branches]) + (weight @ shift[:, :, None])[:, :, 0]
    weight = weight * scale[:, None, :]
    parts = 3 if name == "qkv" else 1
    weight = weight.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)
    return weight, bias.unflatten(1, (parts, -1)).transpose(0, 1).flatten()


def side_by_side_out(branches: nn.ModuleList, name: str) -> tuple[Tensor, Tensor]:
    """Last matrices with LayerScale folded in: (D, K F), and the biases apart, (K, D)."""
    weight = torch.stack([getattr(b.f, name).weight for b in branches])
    bias = torch.stack([getattr(b.f, name).bias for b in branches])
    if branches[0].gamma is not None:
        gamma = torch.stack([b.gamma for b in branches])
        weight, bias = weight * gamma[:, :, None], bias * gamma
    return weight.transpose(0, 1).flatten(1), bias


class FusedLayer(nn.Module):
    """One wide MHSA and one wide FFN behind norms without affine part: (B, N, D) -> (B, N, D), in eval mode only."""

    def __init__(self, layer: ParallelLayer):
        super().__init__()
        K, own = len(layer.mhsa), layer.mhsa[0].f
        D = own.proj.out_features
        self.norm = nn.LayerNorm(D, eps=EPS, elementwise_affine=False)
        like = {"dtype": own.proj.weight.dtype, "device": own.proj.weight.device}
        self.mhsa = MHSA(D, K * own.heads, inner=K * D).to(**like)
        self.ffn = FFN(D, inner=4 * K * D).to(**like)
        self.branches = K
        for wide, branches, first, last in (
            (self.mhsa, layer.mhsa, "qkv", "proj"),
            (self.ffn, layer.ffn, "fc1", "fc2"),
        ):
            weight, bias = side_by_side_in(branches, first)
            _fill(getattr(wide, first), weight, bias)
            weight, bias = side_by_side_out(branches, last)
            _fill(getattr(wide, last), weight, bias.sum(0))

    def forward(self, x: Tensor, draws: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if self.training:
            raise UsageError("a fused model is for inference: call .eval(), or train with set_execution(model, 'par')")
        x = x + self.mhsa(self.norm(x), None if bias is None else bias.repeat(self.branches, 1, 1))
        return x + self.ffn(self.norm(x))


@torch.no_grad()
def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


@torch.no_grad()
def fuse(model: ViT) -> ViT:
    """A copy of `model` whose branches are fused, in eval mode and frozen: the same logits up to rounding.

    An 18x2 model becomes an 18-layer ViT with twice the heads and a twice wider FFN.
    """
    fused = copy.deepcopy(model)
    fused.layers = nn.ModuleList(FusedLayer(layer) for layer in model.layers)
    return fused.eval().requires_grad_(False)
