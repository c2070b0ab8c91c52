"""Thing 3: patch pre-processing (section 5, Figure 5, Algorithm 1, Table 7).

Every stem turns an image (B, C, H, W) into one token a patch, (B, N, D). In the linear and the hMLP stem each
kernel equals its stride, so no pixel of one patch reaches another: masking a patch before the stem or replacing its
token after it is the same. The convolutional stem has 3x3 kernels with stride 2, which overlap, so masked pixels
leak into visible tokens.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model.config import ViTConfig
from vitlib.model.layers import EPS

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
    """Released code: SyncBatchNorm, which does not train on CPU with several processes; BatchNorm2d here."""
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


STEMS = {"linear": linear_stem, "hmlp": hmlp_stem, "conv": conv_stem}


def make_stem(config: ViTConfig) -> Stem:
    return STEMS[config.stem](config)
