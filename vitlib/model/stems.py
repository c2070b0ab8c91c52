"""Thing 3: patch pre-processing (section 5, Figure 5, Algorithm 1, Table 7).

Every stem turns an image (B, C, H, W) into one token a patch, (B, N, D). In the linear and the hMLP stem each
kernel equals its stride, so no pixel of one patch reaches another: masking a patch before the stem or replacing its
token after it is the same. The convolutional stem has 3x3 kernels with stride 2, which overlap, so masked pixels
leak into visible tokens. In the local-transformer stem a small transformer works inside of each patch alone.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model.config import ViTConfig
from vitlib.model.layers import EPS, attention

# Kernels = strides of the three hMLP convolutions by patch size.
# Paper: the text says it starts from 2x2 patches; Figure 5, Algorithm 1, the released code and the printed 17.73
# GFLOPs say 4, 2, 2 for patches of 16. We follow the latter and choose the nearest triple at other sizes.
HMLP_KERNELS = {4: (2, 2, 1), 8: (2, 2, 2), 14: (7, 2, 1), 16: (4, 2, 2), 32: (8, 2, 2)}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map, (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


def _norm(kind: str, width: int) -> list[nn.Module]:
    """Released code: SyncBatchNorm, which does not train on CPU with several processes; BatchNorm2d here, which a run over
    several GPUs turns into it (`train/engine.py`).
    """
    return {"none": [], "bn": [nn.BatchNorm2d(width)], "ln": [ChannelNorm(width, eps=EPS)]}[kind]


def _act(kind: str) -> list[nn.Module]:
    return {"none": [], "gelu": [nn.GELU()]}[kind]


class Stem(nn.Sequential):
    """Convolutions, then flatten: (B, C, H, W) -> (B, N, D), patches in row-major order."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


def linear_stem(config: ViTConfig) -> Stem:
    """One linear map of each patch; optionally a norm and a GELU behind it (rows 2 to 4 of Table 7)."""
    D, P = config.width, config.patch_size
    return Stem(nn.Conv2d(config.in_chans, D, P, P), *_norm(config.stem_norm, D), *_act(config.stem_act))


def hmlp_stem(config: ViTConfig) -> Stem:
    """Algorithm 1: three linear maps from ever larger sub-patches, norm after each, GELU between, none at the end."""
    D, hidden, norm = config.width, config.width // 4, config.stem_norm
    first, second, third = HMLP_KERNELS.get(config.patch_size, (config.patch_size, 1, 1))
    return Stem(
        nn.Conv2d(config.in_chans, hidden, first, first), *_norm(norm, hidden), *_act(config.stem_act),
        nn.Conv2d(hidden, hidden, second, second), *_norm(norm, hidden), *_act(config.stem_act),
        nn.Conv2d(hidden, D, third, third), *_norm(norm, D),
    )  # fmt: skip


def conv_stem(config: ViTConfig) -> Stem:
    """LeViT's stem (Graham et al. 2021): log2(P) convolutions 3x3 of stride 2, widths ..., D/4, D/2, D, no bias.

    Paper: not written out; this reading gives the 19.07 GFLOPs of Table 7 (3,489,120 parameters for B/16).
    """
    steps = config.patch_size.bit_length() - 1
    widths = [config.in_chans] + [config.width >> (steps - 1 - i) for i in range(steps)]
    parts: list[nn.Module] = []
    for i, (fan_in, width) in enumerate(itertools.pairwise(widths)):
        parts += [nn.Conv2d(fan_in, width, 3, 2, 1, bias=False), *_norm(config.stem_norm, width)]
        parts += _act(config.stem_act) if i < steps - 1 else []
    return Stem(*parts)


class LocalStem(Stem):
    """A transformer inside of each patch, then one linear map: TNT's inner half (Han et al. 2021) as a stem.

    Each patch is 4x4 inner patches; their tokens, D/8 long with positions that all patches share, go through 4 layers of
    attention (4 heads, as in TNT) and FFN; the 16 of them together, with one norm, make the patch's token. (A norm for each,
    as in TNT's first version, takes away a patch's contrast: much worse in short training at small width.)

    Paper: Table 7 prints 19.12 GFLOPs for ViT-B12 with it and does not say how it is built. This one has 19.15 as the
    paper counts (`lab.measure.macs`: 19.152 G, 0.17 % more; 19.120 G without norms). TNT itself passes from inner to
    outer tokens in every layer, with inner tokens 40 long, and its first convolution is 7x7 over the whole image, which
    reaches into neighbouring patches.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, inner = config.width // 8, config.patch_size // 4
        self.patch = nn.Conv2d(config.in_chans, width, inner, inner)
        self.positions = nn.Parameter(torch.empty(1, 16, width))
        self.layers = nn.Sequential(*(InnerLayer(width, heads=4) for _ in range(4)))
        self.norm = nn.LayerNorm(16 * width, eps=EPS)
        self.proj = nn.Linear(16 * width, config.width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images)  # (B, D/8, 4 grid, 4 grid)
        B, _, side, _ = x.shape
        x = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1)  # B, row, column, 4, 4, D/8
        x = self.layers(x.reshape(-1, 16, x.shape[-1]) + self.positions)
        return self.proj(self.norm(x.reshape(B, (side // 4) ** 2, -1)))


class InnerLayer(nn.Module):
    """One layer of eq. (1), (B, N, D) -> (B, N, D), in a class of its own: its weights are the stem's, and neither what
    attention-only fine-tuning trains nor what LayerScale and drop-path act on.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(attention(self.norm1(x), self.qkv.weight, self.qkv.bias, self.heads))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


STEMS = {"linear": linear_stem, "hmlp": hmlp_stem, "conv": conv_stem, "local": LocalStem}


def make_stem(config: ViTConfig) -> Stem:
    return STEMS[config.stem](config)
