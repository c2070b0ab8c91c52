"""Algorithm 1 outside of a ViT: the hMLP stem for signals, images and volumes, and its transposed decoder.

    patches = HMLP(patch_size=8, width=96, in_chans=2, dims=3)
    stem, decoder = HMLPStem(patches), HMLPDecoder(patches)
    tokens = stem(volumes)  # (B, 2, 32, 16, 24) -> (B, 4 * 2 * 3, 96)
    decoder(tokens, volumes.shape[2:])  # -> (B, 2, 32, 16, 24)

In eval mode, or with norm="ln", no patch reaches another's token, nor a token another's patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitlib.errors import UsageError
from vitlib.model.stems import Stem, act, hmlp_kernels, hmlp_refuses, hmlp_stem, norm
from vitlib.records import check


@dataclass(frozen=True)
class HMLP:
    """What a stem and its decoder share. Raises UsageError for an odd patch, and for what else cannot be."""

    patch_size: int  # P, even
    width: int  # D, the token's length
    in_chans: int = 3
    dims: int = 2  # 1: signals (B, C, L); 2: images (B, C, H, W); 3: volumes (B, C, T, H, W)
    norm: str = "bn"  # after each convolution: none, bn or ln
    act: str = "gelu"  # between them: none or gelu
    stem_width: int | None = None  # hidden channels; None = width / 4

    def __post_init__(self) -> None:
        check(self, {"dims": (1, 2, 3), "norm": ("none", "bn", "ln"), "act": ("none", "gelu")}, ())
        if reason := hmlp_refuses(self):
            raise UsageError(reason)

    def grid(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Patches in each direction. Raises UsageError for sizes that the patch does not divide."""
        if len(sizes) != self.dims or any(size % self.patch_size for size in sizes):
            given = " x ".join(map(str, sizes))
            raise UsageError(f"sizes are {given}: allowed are {self.dims}, multiples of patch_size {self.patch_size}")
        return tuple(size // self.patch_size for size in sizes)


class HMLPStem(Stem):
    """(B, C, *sizes) -> (B, N, D): a token per patch, in row-major order. Weights and names as in a ViT's stem."""

    def __init__(self, patches: HMLP):
        super().__init__(*hmlp_stem(patches, patches.dims))
        self.patches = patches

    def forward(self, x: Tensor) -> Tensor:
        self.patches.grid(x.shape[2:])
        return super().forward(x)


class HMLPDecoder(nn.Sequential):
    """(B, N, D) and the input's sizes -> (B, C, *sizes): Algorithm 1 backwards, each patch from its own token alone."""

    def __init__(self, patches: HMLP):
        D, hidden, dims = patches.width, patches.stem_width or patches.width // 4, patches.dims
        first, second, third = hmlp_kernels(patches.patch_size)
        Back = getattr(nn, f"ConvTranspose{dims}d")
        super().__init__(
            Back(D, hidden, third, third), *norm(patches, hidden, dims), *act(patches),
            Back(hidden, hidden, second, second), *norm(patches, hidden, dims), *act(patches),
            Back(hidden, patches.in_chans, first, first),
        )  # fmt: skip
        self.patches = patches

    def forward(self, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
        grid = self.patches.grid(sizes)
        if tokens.shape[1] != math.prod(grid):
            raise UsageError(f"there are {tokens.shape[1]} tokens: sizes {tuple(sizes)} have {math.prod(grid)} patches")
        return super().forward(tokens.transpose(1, 2).unflatten(2, grid))
