"""The two residual functions of a ViT, mhsa and ffn, each with its own pre-norm and LayerScale.

Shapes: B batch, N tokens (class token first), D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm. Released code: models_v2.py, partial(nn.LayerNorm, eps=1e-6)


class MHSA(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias` (H, N, N) is added to the attention logits: BEiT's relative positions, else None."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class FFN(nn.Module):
    """Two linear layers with a GELU between, hidden width 4D, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

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
            if draw is None:
                draw = torch.rand(len(x), device=x.device)
            keep = (draw >= self.drop_path).to(y.dtype) / (1 - self.drop_path)
            y = y * keep[:, None, None]
        return y
