"""The Vision Transformer that all three ideas are variants of.

Released code: models_v2.py, vit_models. Positions on patches only, none for the class token; class-token readout
after a last LayerNorm; truncated-normal initialisation of linear layers, positions and class token; convolutions
keep PyTorch's default. (The released pre-training code re-initialises convolutions too: one of the differences
between the two halves of Table 7 that we do not follow.)
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.draws import key
from vitlib.errors import UsageError
from vitlib.model.config import ViTConfig
from vitlib.model.layers import EPS, Reads, Rows, take
from vitlib.model.parallel import ParallelLayer
from vitlib.model.stems import make_stem


class ViT(nn.Module):
    """`ViT(config)(images)` gives logits: (B, C, H, W) -> (B, num_classes).

    Initial values are a function of (seed, role, pair), pair = layer * branches + branch, so that 12x1, 6x2, 4x3 and
    3x4 start from identical tensors, and arms with different stems from identical blocks.
    """

    # The last layer computes only the tokens that are read after it, e.g. the class token: the same logits, and up to 10/12
    # of that layer's multiply-adds are saved. False: every token, as the paper's multiply-adds are counted.
    skip_unread = True
    # True: a layer's activations are not kept for the backward pass but computed again. Non-reentrant: the reentrant form
    # finds nothing to differentiate in the first layer when the stem and the positions are frozen.
    checkpointing = False

    def __init__(self, config: ViTConfig, seed: int = 0):
        super().__init__()
        if not isinstance(config, ViTConfig):
            raise UsageError(f"ViT wants a ViTConfig, not {config!r}: for example ViT(vit_config('B12'))")
        D = config.width
        self.config = config
        self.stem = make_stem(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        # "patches": none for the class token
        positions = {"patches": config.tokens - 1, "all": config.tokens, "relative": 0}[config.pos]
        self.pos_embed = nn.Parameter(torch.empty(1, positions, D)) if positions else None
        self.relative = RelativeBias(config) if config.pos == "relative" else None
        self.layers = nn.ModuleList(ParallelLayer(config) for _ in range(config.depth))
        # last norm, then a head (none in masked pre-training)
        self.norm = nn.LayerNorm(D, eps=EPS)
        self.head = nn.Linear(D, config.num_classes) if config.num_classes else nn.Identity()
        initialise(self, seed)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, num_classes). `draws` (pairs, 2, B): stochastic depth, uniform in [0, 1)."""
        # the class token's logits need no other token of the last layer
        read = slice(0, 1) if self.config.pool == "cls" else None
        x = self.encode(self.embed(images), draws, read)  # (B, 1, D), or (B, 1 + patches, D) for the mean
        return self.head(self.pool(x))

    def embed(self, images: Tensor) -> Tensor:
        """The stem: (B, C, H, W) -> (B, patches, D). Masked pre-training replaces tokens after it."""
        C, size = self.config.in_chans, self.config.image_size
        if images.shape[1:] != (C, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}, this model wants (B, {C}, {size}, {size})")
        return self.stem(images)

    def tokens(self, x: Tensor) -> Tensor:
        """The class token, which is token 0, and positions: (B, patches, D) -> (B, 1 + patches, D)."""
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.config.pos == "patches":
            x = x + self.pos_embed
        x = torch.cat([cls_token, x], dim=1)
        if self.config.pos == "all":
            x = x + self.pos_embed
        return x

    def reads(self) -> Reads:
        """What attention is told besides x: one table of relative positions for all layers."""
        return Reads(None if self.relative is None else self.relative())

    def encode(self, x: Tensor, draws: Tensor | None = None, rows: Rows = None) -> Tensor:
        """Class token, positions, layers, last norm: (B, patches, D) -> (B, 1 + patches, D).

        `rows`: the tokens that will be read, all by default; (B, M, D) then.
        """
        x = self.tokens(x)  # N = 1 + patches from here on
        reads, K = self.reads(), self.config.branches
        for i, layer in enumerate(self.layers):
            # what is not read after the last layer is skipped there
            if self.skip_unread and i == len(self.layers) - 1:
                reads = reads._replace(rows=rows)
            # this layer's draws, (K, 2, B) of (pairs, 2, B)
            drawn = None if draws is None else draws[i * K : (i + 1) * K]
            run = functools.partial(checkpoint, layer, use_reentrant=False) if self.checkpointing else layer
            x = run(x, drawn, reads)
        x = self.norm(x)  # (B, M, D)
        return x if self.skip_unread else take(x, rows)

    def pool(self, x: Tensor) -> Tensor:
        """What the head reads: (B, 1 + patches, D) -> (B, D)."""
        return x[:, 0] if self.config.pool == "cls" else x[:, 1:].mean(dim=1)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions that timm's optimizer factory must not decay."""
        return {"cls_token", "pos_embed", "relative.table", "stem.positions"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Depth groups for timm's layer decay: all before the layers, each layer, and the rest at scale 1.0.

        The last norm belongs to the rest, the head's group, as in BEiT. (timm's own models give it a group below.)
        """
        return {"stem": r"stem|cls_token|pos_embed|relative", "layers": r"layers\.(\d+)"}


class RelativeBias(nn.Module):
    """One learned bias per head and relative position, shared by all layers, as in BEiT: () -> (H, N, N).

    The class token has three entries: to itself, to a patch, from a patch.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.grid = config.grid
        self.table = nn.Parameter(torch.zeros((2 * config.grid - 1) ** 2 + 3, config.heads))

    def index(self) -> Tensor:
        """The row of the table for each pair of tokens, int64 (N, N).

        Made at each call: a buffer outside of the state would be empty after a model was made on the meta device.
        """
        grid, span = self.grid, 2 * self.grid - 1
        # row and column of each patch
        place = torch.arange(grid * grid, device=self.table.device)
        row, column = place // grid, place % grid
        # offset of patch j from patch i, from 0 to span - 1 in each direction
        apart = (row[:, None] - row + grid - 1) * span + column[:, None] - column + grid - 1
        of_class = torch.full_like(place, span * span)
        # row 0 is the class token: to itself, then to each patch; column 0 is from each patch to it
        from_class = torch.cat([of_class[:1], of_class + 1])
        from_patch = torch.cat([of_class[:, None] + 2, apart], dim=1)
        return torch.cat([from_class[None], from_patch])

    def forward(self) -> Tensor:
        return self.table[self.index()].permute(2, 0, 1)


@torch.no_grad()
def initialise(model: ViT, seed: int) -> None:
    """Fill every parameter of `model` in place; each tensor has its own random generator. On the meta device there is nothing to fill."""
    config = model.config
    if model.cls_token.is_meta:
        return

    def generator(role: str, pair: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(key(seed, "init", role, pair) >> 1)

    def normal(tensor: Tensor, role: str, pair: int = 0) -> None:
        """Truncated at +-2 (absolute), which cuts nothing: the real standard deviation is the nominal one."""
        nn.init.trunc_normal_(tensor, std=config.init_std, generator=generator(role, pair))

    def linear(module: nn.Linear, role: str, pair: int = 0) -> None:
        normal(module.weight, role, pair)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

    # qkv, proj, fc1, fc2 of every pair
    for i, layer in enumerate(model.layers):
        for kind in ("mhsa", "ffn"):
            for pair, residual in enumerate(getattr(layer, kind), start=i * config.branches):
                for name, module in residual.f.named_children():
                    linear(module, f"{kind}.{name}", pair)
                    if config.shrink_deep and name in ("proj", "fc2"):  # by pair, so that 12x1 and 6x2 start equal
                        module.weight.div_(math.sqrt(2 * (pair + 1)))
    # around the layers
    if config.num_classes:
        linear(model.head, "head")
        model.head.weight.mul_(config.head_scale)
    normal(model.cls_token, "cls_token")
    if model.pos_embed is not None:
        normal(model.pos_embed, "pos_embed")
    # the stem, by kind of module
    for prefix, module in model.stem.named_modules(prefix="stem"):
        if isinstance(module, nn.Linear):
            linear(module, prefix)
        elif isinstance(module, nn.Conv2d):  # as PyTorch starts them: uniform between +-1 / sqrt(fan in)
            draws, bound = generator(prefix), 1 / math.sqrt(module.weight[0].numel())
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=draws)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=draws)
        elif not hasattr(module, "reset_parameters"):  # e.g. positions; other layers of PyTorch start by themselves
            for name, tensor in module.named_parameters(prefix, recurse=False):
                normal(tensor, name)


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Position embedding of another resolution: (1, n * n, D) or (1, 1 + n * n, D) -> the same with grid * grid.

    Bicubic, no corner alignment, no antialiasing, the class token's row kept: the released code's way. (timm
    resizes with antialiasing, which uses another bicubic kernel and differs even when enlarging.)
    """
    patches = pos_embed.shape[1]
    old = math.isqrt(patches)
    extra = patches - old * old  # 1 where the class token has a position too
    if extra not in (0, 1):
        raise ValueError(f"{patches} positions are neither a square grid nor a square grid and a class token")
    if old == grid:
        return pos_embed
    # (1, n * n, D) -> (1, D, n, n) -> (1, D, grid, grid) -> (1, grid * grid, D)
    table = pos_embed[:, extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    # in float32 at least: half precision would move positions by its rounding
    exact = torch.promote_types(table.dtype, torch.float32)
    table = F.interpolate(table.to(exact), size=(grid, grid), mode="bicubic", align_corners=False).to(table)
    return torch.cat([pos_embed[:, :extra], table.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)
