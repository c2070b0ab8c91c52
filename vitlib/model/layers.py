"""The two residual functions of a ViT, mhsa and ffn, each with its own pre-norm and LayerScale.

Shapes: B batch, N tokens (class token first), M of them that are read, D width, H heads of size d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm. Released code: models_v2.py, partial(nn.LayerNorm, eps=1e-6)


# Which tokens of a layer are read by what follows: all (None), a slice, or token numbers of each image, int64 (B, M).
Rows = slice | Tensor | None


def take(x: Tensor, rows: Rows) -> Tensor:
    """The tokens `rows` of x: (B, N, D) -> (B, M, D)."""
    if rows is None:
        return x
    return x[:, rows] if isinstance(rows, slice) else x.take_along_dim(rows[..., None], dim=1)


def attention(
    x: Tensor, weight: Tensor, bias: Tensor, heads: int, relative: Tensor | None = None, rows: Rows = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in every head, before the last projection: (B, N, D) -> (B, M, heads d).

    The rows of `weight` (3 heads d, D) and `bias` are q, then k, then v, heads in order within each. `relative`
    (heads, N, N) is added to the logits. Queries are made for the tokens `rows` only.
    """
    if rows is None:
        q, k, v = _heads(F.linear(x, weight, bias), 3, heads)
    else:
        inner = len(weight) // 3
        of_q, of_kv = weight.split([inner, 2 * inner])
        bias_q, bias_kv = bias.split([inner, 2 * inner])
        (q,) = _heads(F.linear(take(x, rows), of_q, bias_q), 1, heads)
        k, v = _heads(F.linear(x, of_kv, bias_kv), 2, heads)
        if relative is not None:
            relative = relative[:, rows]  # (heads, M, N), or (heads, B, M, N) where each image has rows of its own
            relative = relative if relative.ndim == 3 else relative.transpose(0, 1)
    if relative is None or q.is_cuda:
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=relative)
    else:  # PyTorch's CPU kernel takes no bias that trains; what it falls back to is slower than this
        heard = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + relative).softmax(-1) @ v
    return heard.transpose(1, 2).flatten(2)


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts heads d) -> `parts` tensors (B, heads, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class MHSA(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, M, D). `inner` = heads x head size, D unless branches are fused.

    key_bias: False leaves the bias of k out, as BEiT; those of q and v are tensors of their own then.
    """

    def __init__(self, width: int, heads: int, inner: int | None = None, key_bias: bool = True):
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * inner, bias=key_bias)
        self.proj = nn.Linear(inner, width)
        self.q_bias, self.v_bias = (None if key_bias else nn.Parameter(torch.zeros(inner)) for _ in "qv")

    @property
    def qkv_bias(self) -> Tensor:
        """(3 inner,), zero for a k without bias."""
        if self.q_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, relative: Tensor | None = None, rows: Rows = None) -> Tensor:
        """`relative` (H, N, N): BEiT's relative positions, else None. `rows`: the M tokens that are read."""
        return self.proj(attention(x, self.qkv.weight, self.qkv_bias, self.heads, relative, rows))


class FFN(nn.Module):
    """Two linear layers with a GELU between, (B, N, D) -> (B, N, D). `inner` = 4D unless branches are fused."""

    def __init__(self, width: int, inner: int | None = None):
        super().__init__()
        inner = inner or 4 * width
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, draw: Tensor | None = None, **reads: object) -> Tensor:
        """(B, N, D) -> (B, M, D). `draw` (B,) is uniform in [0, 1): the samples below the rate are dropped.

        `reads`: what MHSA takes besides, relative positions and rows.
        """
        y = self.f(self.norm(x), **reads)
        if self.gamma is not None:
            y = y * self.gamma
        if self.training and self.drop_path > 0:
            keep = (draw >= self.drop_path).to(y.dtype) / (1 - self.drop_path)
            y = y * keep[:, None, None]
        return y
