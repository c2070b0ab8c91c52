"""The two residual functions of a ViT, mhsa and ffn, each with its own pre-norm and LayerScale.

Shapes: B batch, N tokens (class token first), D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm. Released code: models_v2.py, partial(nn.LayerNorm, eps=1e-6)


def attend(qkv: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in every head: (B, N, 3 heads d) -> (B, N, heads d).

    The last axis of `qkv` is q, then k, then v, heads in order within each. `bias` (heads, N, N) is added to the
    logits.
    """
    B, N, width = qkv.shape
    q, k, v = qkv.view(B, N, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(B, N, width // 3)


class MHSA(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). `inner` = heads x head size, D unless branches are fused."""

    def __init__(self, width: int, heads: int, inner: int | None = None):
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` (H, N, N): BEiT's relative positions, else None."""
        return self.proj(attend(self.qkv(x), self.heads, bias))


class FFN(nn.Module):
    """Two linear layers with a GELU between, (B, N, D) -> (B, N, D). `inner` = 4D unless branches are fused."""

    def __init__(self, width: int, inner: int | None = None):
        super().__init__()
        inner = inner or 4 * width
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor, bias: None = None) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(nn.Module):
    """r(x) = gamma * f(LayerNorm(x)): one residual function with its own pre-norm and LayerScale.

    Stochastic depth multiplies the whole branch, drop_path(gamma * f(norm(x))), as in the released code; its draws
    come from outside, so that they are a function of the image and not of the batch.
    """

    def __init__(self, f: nn.Module, width: int, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.f = f
        self.gamma = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale is not None else None
        self.drop_path = drop_path

    def forward(self, x: Tensor, draw: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D). `draw` (B,) is uniform in [0, 1): the samples below the rate are dropped."""
        y = self.f(self.norm(x), bias)
        if self.gamma is not None:
            y = y * self.gamma
        if self.training and self.drop_path > 0:
            keep = (draw >= self.drop_path).to(y.dtype) / (1 - self.drop_path)
            y = y * keep[:, None, None]
        return y
