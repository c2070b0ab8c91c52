"""Thing 3: patch pre-processing (section 5, Figure 5, Algorithm 1, Table 7).

Every stem turns images (B, C, H, W) into one token per patch, (B, N, D). In the linear and the hMLP stem each
kernel equals its stride, so no pixel of one patch reaches another: masking a patch before the stem or replacing its
token after it is the same. The convolutional stem has 3x3 kernels with stride 2, which overlap, so masked pixels
leak into visible tokens. In the local-transformer stem a small transformer works inside of each patch alone.

A stem is a function (or class) of the configuration and one entry of `STEMS`, with its default norm and activation and the
configurations that it refuses; `ViTConfig` looks them up there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model.layers import EPS, attend


class Patches(Protocol):
    """What a stem reads of a `ViTConfig`."""

    in_chans: int  # C
    patch_size: int  # P
    width: int  # D
    stem_width: int | None  # hidden channels; None = the stem's own
    norm: str  # after each convolution: none, bn or ln
    act: str  # none or gelu


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map, (B, C, H, W) -> (B, C, H, W), or of other dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm(config: Patches, width: int, dims: int = 2) -> list[nn.Module]:
    """The norm of a map of `width` channels, or nothing.

    Released code: SyncBatchNorm, which does not train on CPU with several processes; BatchNorm2d here, which a run over
    several GPUs turns into it (`train/engine.py`).
    """
    batch_norm = getattr(nn, f"BatchNorm{dims}d")
    return {"none": [], "bn": [batch_norm(width)], "ln": [ChannelNorm(width, eps=EPS)]}[config.norm]


def act(config: Patches) -> list[nn.Module]:
    return {"none": [], "gelu": [nn.GELU()]}[config.act]


class Stem(nn.Sequential):
    """Convolutions, then flatten: (B, C, H, W) -> (B, N, D), patches in row-major order."""

    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        if x.requires_grad and x.shape[0] == 1:  # on CPU, PyTorch's batch norm misreads one image's transposed gradient
            x.register_hook(Tensor.contiguous)
        return x.flatten(2).transpose(1, 2)  # (B, D, grid, grid) -> (B, grid * grid, D)


def linear_stem(config: Patches) -> Stem:
    """One linear map of each patch; optionally a norm and a GELU after it (rows 2 to 4 of Table 7)."""
    D, P = config.width, config.patch_size
    # (B, C, H, W) -> (B, D, H / P, W / P)
    return Stem(nn.Conv2d(config.in_chans, D, P, P), *norm(config, D), *act(config))


def hmlp_stem(config: Patches, dims: int = 2) -> Stem:
    """Algorithm 1: three linear maps from ever larger sub-patches, norm after each, GELU between, none at the end.

    dims: 1 for signals (B, C, L), 3 for volumes (B, C, T, H, W); `vitlib.model.hmlp` has the way back from tokens.
    """
    D, hidden = config.width, config.stem_width or config.width // 4
    first, second, third = hmlp_kernels(config.patch_size)
    Conv = getattr(nn, f"Conv{dims}d")
    # Each kernel equals its stride. Sides of the map, P = 16: H -> H / 4 -> H / 8 -> H / 16.
    return Stem(
        Conv(config.in_chans, hidden, first, first), *norm(config, hidden, dims), *act(config),
        Conv(hidden, hidden, second, second), *norm(config, hidden, dims), *act(config),
        Conv(hidden, D, third, third), *norm(config, D, dims),
    )  # fmt: skip


def hmlp_kernels(patch_size: int) -> tuple[int, int, int]:
    """Kernels = strides of the three convolutions: (4, 2, 2) for patches of 16.

    Paper: the text says it starts from 2x2 patches; Figure 5, Algorithm 1, the released code (for patches of 16 alone)
    and the printed 17.73 GFLOPs say 4, 2, 2. The last map then reads 2x2 places of D/4 channels, D numbers, and so it
    does here at every even P; where 4 does not divide P, the second map is 1x1.
    """
    return (patch_size // 4, 2, 2) if patch_size % 4 == 0 else (patch_size // 2, 1, 2)


def hmlp_refuses(config: Patches) -> str | None:
    if config.patch_size < 2 or config.patch_size % 2:
        return f"the hMLP stem has patch_size {config.patch_size}: allowed are even ones, as its last kernel is 2x2"
    if config.stem_width is None and config.width % 4:
        return f"the hMLP stem has hidden width width / 4, and width {config.width} is no multiple of 4"
    return None


def conv_stem(config: Patches) -> Stem:
    """LeViT's stem (Graham et al. 2021): log2(P) convolutions 3x3 of stride 2, widths ..., D/4, D/2, D, no bias.

    Paper: not written out; this reading gives the 19.07 GFLOPs of Table 7 (3,489,120 parameters for B/16).
    """
    steps = config.patch_size.bit_length() - 1  # log2(P)
    widths = [config.in_chans] + [config.width >> (steps - 1 - i) for i in range(steps)]
    parts: list[nn.Module] = []
    for i, (fan_in, width) in enumerate(itertools.pairwise(widths)):
        parts += [nn.Conv2d(fan_in, width, 3, 2, 1, bias=False), *norm(config, width)]  # each halves the map's side
        parts += act(config) if i < steps - 1 else []  # as in hMLP, none at the end
    return Stem(*parts)


def conv_refuses(config: Patches) -> str | None:
    if config.patch_size not in (2, 4, 8, 16, 32, 64):
        return f"the convolutional stem has patch_size {config.patch_size}: allowed are 2, 4, 8, 16, 32, 64"
    if config.width < config.patch_size // 2:  # its first width is D / (P / 2)
        return (
            f"the convolutional stem has width {config.width} at patch_size {config.patch_size}: its first map is empty"
        )
    return None


class LocalStem(Stem):
    """A transformer inside of each patch, then one linear map: TNT's inner half (Han et al. 2021) as a stem.

    Each patch is 4x4 inner patches; their tokens, D/8 long with positions that all patches share, go through 4 layers of
    attention (4 heads, as in TNT) and FFN; the 16 of them together, with one norm, make the patch's token. (A norm for each,
    as in TNT's first version, takes away a patch's contrast: much worse in short training at small width.)

    Paper: Table 7 prints 19.12 GFLOPs for ViT-B12 with it and does not say how it is built. This one has 19.15 as the
    paper counts (`lab.cost.count.macs`: 19.152 G, 0.17 % more; 19.120 G without norms). TNT itself passes from inner to
    outer tokens in every layer, with inner tokens 40 long, and its first convolution is 7x7 over the whole image, which
    reaches into neighbouring patches.
    """

    def __init__(self, config: Patches):
        super().__init__()
        width, inner = config.width // 8, config.patch_size // 4
        # a linear map of each inner patch, (P / 4)^2 pixels; 16 positions, the same in every patch
        self.patch = nn.Conv2d(config.in_chans, width, inner, inner)
        self.positions = nn.Parameter(torch.empty(1, 16, width))
        self.layers = nn.Sequential(*(InnerLayer(width, heads=4) for _ in range(4)))
        # one norm over all 16 inner tokens, then the map to the patch's token
        self.norm = nn.LayerNorm(16 * width, eps=EPS)
        self.proj = nn.Linear(16 * width, config.width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images)  # (B, D/8, 4 grid, 4 grid)
        patches = x.shape[-2] // 4 * (x.shape[-1] // 4)
        # Rows and columns of the map are split into patches and places within: (B, grid, grid, 4, 4, D/8).
        x = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1)
        x = x.flatten(3, 4).flatten(0, 2)  # (B grid grid, 16, D/8): each patch is a sequence by itself
        x = self.layers(x + self.positions)
        # The 16 inner tokens together are the patch's: (B, grid * grid, 16 D/8) -> (B, N, D).
        return self.proj(self.norm(x.flatten(1).unflatten(0, (-1, patches))))


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
        x = x + self.proj(attend(*self.qkv(self.norm1(x)).chunk(3, dim=-1), self.heads))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def local_refuses(config: Patches) -> str | None:
    if config.patch_size % 4 or config.width % 32:
        return (
            f"the local-transformer stem has patch_size {config.patch_size} and width {config.width}: "
            "allowed are multiples of 4 and of 32"
        )
    if (config.norm, config.act) != ("none", "none"):
        return "the local-transformer stem has norms and GELUs of its own: stem_norm and stem_act are none"
    return None


class Kind(NamedTuple):
    """What `ViTConfig` needs to know of a stem."""

    make: Callable[[Patches], Stem]
    norm: str = "none"  # what it has unless told otherwise (Table 7)
    act: str = "none"
    hidden: bool = False  # whether it has hidden channels, whose number is `stem_width`
    refuses: Callable[[Patches], str | None] = lambda config: None  # why it cannot be built, in one sentence


STEMS = {
    "linear": Kind(linear_stem),
    "conv": Kind(conv_stem, "bn", "gelu", refuses=conv_refuses),
    "hmlp": Kind(hmlp_stem, "bn", "gelu", hidden=True, refuses=hmlp_refuses),
    "local": Kind(LocalStem, refuses=local_refuses),
}


def make_stem(config: Patches) -> Stem:
    return STEMS[config.stem].make(config)


@torch.no_grad()
def leak_map(stem: nn.Module, images: Tensor, others: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """How far each token moves, relative to the mean norm of a token, when masked pixels become those of `others`: (N,), mean
    over images.

    mask: bool, in the shape of the grid, True = masked. 0 means equal to the last bit.
    """
    for axis in range(mask.ndim):  # from patches to pixels
        mask = mask.repeat_interleave(patch_size, axis)
    tokens, changed = stem(images), stem(torch.where(mask, others, images))
    length = tokens.norm(dim=-1).mean()
    return (changed - tokens).norm(dim=-1).mean(0) / length.clamp(min=torch.finfo(length.dtype).tiny)


@torch.no_grad()
def leakage(stem: nn.Module, patch_size: int, in_chans: int = 3, grid: int = 5, dims: int = 2) -> Tensor:
    """Which visible tokens a stem changes when the pixels of a patch change: bool (N, N), [i, j] for patch i and token j.

    `stem` maps images (B, in_chans, H, W) to tokens (B, N, D), ours or another's; of grid x grid patches one at a time is
    blanked, in eval mode. dims: 1 for signals, 3 for volumes. The diagonal is left out: all False is a stem that commutes
    with masking.
    """
    weight, training = next(stem.parameters(), torch.empty(0)), stem.training
    stem.eval()
    image = torch.rand(1, in_chans, *dims * [grid * patch_size], generator=torch.Generator().manual_seed(0)).to(weight)
    patches = torch.eye(grid**dims, dtype=torch.bool, device=weight.device)
    maps = [leak_map(stem, image, 0 * image, one.view(dims * [grid]), patch_size) for one in patches]
    stem.train(training)
    return (torch.stack(maps) != 0) & ~patches
