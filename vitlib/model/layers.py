"""The two residual functions of a ViT, mhsa and ffn, each with a pre-norm and a LayerScale.

Shapes: B batch, N tokens (class token first), M of them that are read, D width, H heads of size d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

EPS = 1e-6  # of every LayerNorm. Released code: models_v2.py, partial(nn.LayerNorm, eps=1e-6)

# Which tokens of a layer are read by what follows: all (None), a slice, or token numbers of each image, int64 (B, M).
Rows = slice | Tensor | None


def take(x: Tensor, rows: Rows) -> Tensor:
    """The tokens `rows` of x: (B, N, D) -> (B, M, D)."""
    if rows is None:
        return x
    return x[:, rows] if isinstance(rows, slice) else x.take_along_dim(rows[..., None], dim=1)


class Reads(NamedTuple):
    """Attention's inputs besides x: a bias on its logits, and the tokens whose output is needed."""

    relative: Tensor | None = None  # (H, N, N), added to the logits: BEiT's relative positions
    rows: Rows = None  # the M tokens that are read after the layer: nothing is computed for the others


ALL = Reads()


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether `module` is exactly one of these classes, without hooks: its weights may then be used in place of a call.

    Adapters (LoRA), quantized layers and parametrizations are other classes; old weight norms and user code are hooks,
    on the module or on all modules, or a `forward` of the instance; quantized weights may be tensor subclasses.
    """
    if type(module) not in kinds or "forward" in module.__dict__ or _has_any_global_hook():
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    weight = module._parameters.get("weight")
    return weight is None or type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__")


def project(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, M, H d) of the tokens `rows`, k and v (B, N, H d) of all; `weight` (3 H d, D) has q, k, v in this order."""
    if rows is None:
        return F.linear(x, weight, bias).chunk(3, dim=-1)
    sizes = [weight.shape[0] // 3, weight.shape[0] // 3 * 2]
    of_q, of_kv = weight.split(sizes)
    bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
    return F.linear(take(x, rows), of_q, bias_q), *F.linear(x, of_kv, bias_kv).chunk(2, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, reads: Reads = ALL) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in every head: q (B, M, H d), k and v (B, N, H d) -> (B, M, H d)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N, d)
    relative, rows = reads
    if relative is not None and rows is not None:
        relative = relative[:, rows]  # (H, M, N), or (H, B, M, N) where each image has rows of its own
        relative = relative if relative.ndim == 3 else relative.transpose(0, 1)
    if relative is None or q.is_cuda:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=relative)
    else:  # PyTorch's CPU kernel takes no bias that trains; what it falls back to is slower than this
        attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + relative).softmax(-1) @ v
    return attended.transpose(1, 2).flatten(2)


def kept(draws: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """Stochastic depth: 0 where a uniform draw is below the rate, else 1 / (1 - rate)."""
    return (draws >= rate).to(dtype) / (1 - rate)


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
    def qkv_bias(self) -> Tensor | None:
        """(3 inner,), zero for a k without bias."""
        if self.q_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, reads: Reads = ALL) -> Tensor:
        if is_plain(self.qkv, nn.Linear):
            q, k, v = project(x, self.qkv.weight, self.qkv_bias, reads.rows)
        else:  # an adapter, a hook, a quantized matrix: called as it is, for all tokens
            qkv = self.qkv(x) if self.q_bias is None else self.qkv(x) + self.qkv_bias
            q, k, v = qkv.chunk(3, dim=-1)
            q = take(q, reads.rows)
        return self.proj(attend(q, k, v, self.heads, reads))


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
    """r(x) = gamma * f(LayerNorm(x)): one residual function with its pre-norm and LayerScale.

    Stochastic depth multiplies the whole branch, drop_path(gamma * f(norm(x))), as in the released code; its draws
    come from outside, so that they are a function of the image and not of the batch.
    """

    def __init__(self, f: nn.Module, width: int, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.f = f
        self.gamma = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale is not None else None
        self.drop_path = drop_path

    def forward(self, x: Tensor, draw: Tensor | None = None, reads: Reads | None = None) -> Tensor:
        """(B, N, D) -> (B, M, D). `draw` (B,) decides which samples are dropped; None: none of them.

        `reads` is for attention alone; an FFN is handed the tokens that are read.
        """
        y = self.f(self.norm(x)) if reads is None else self.f(self.norm(x), reads)
        if self.gamma is not None:
            y = y * self.gamma
        if draw is not None:
            y = y * kept(draw, self.drop_path, y.dtype)[:, None, None]
        return y
