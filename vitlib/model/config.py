"""What a model is, as a small frozen record. `vit_config("B18x2/16")` reads the paper's names.

B18x2 is the width of ViT-B, 18 layers deep, 2 branches a layer: 36 pairs of (MHSA, FFN), the parameters and
multiply-adds of B36x1. Widths below the paper's are called by their number, W64-12x2/4, so that no table calls a
width-64 model "S".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from vitlib.errors import UsageError, unknown

# name -> (width, heads). Paper: Table 1, columns "width" and "heads".
WIDTHS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12), "L": (1024, 16)}
_NAME = re.compile(r"(Ti|S|B|L|W(\d+)-)(\d+)(?:x(\d+))?(?:/(\d+))?")
_CHOICES = {
    "stem": ("linear", "conv", "hmlp", "local"),
    "stem_norm": ("none", "bn", "ln"),
    "stem_act": ("none", "gelu"),
    "pool": ("cls", "mean"),
    "pos": ("patches", "all", "relative"),
}
# (norm, activation) that each stem of Table 7 has unless told otherwise
STEM_DEFAULTS = {"linear": ("none", "none"), "conv": ("bn", "gelu"), "hmlp": ("bn", "gelu"), "local": ("none", "none")}


@dataclass(frozen=True)
class ViTConfig:
    """The size and the parts of one Vision Transformer. Made by `vit_config`, which checks it."""

    width: int  # D, the token's length
    depth: int  # layers, one after the other
    branches: int = 1  # (MHSA, FFN) pairs side by side in each layer; eq. (2) has 2
    heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    layer_scale: float | None = None  # initial value; None = off. Released code: 1e-4; the paper gives none
    drop_path: float = 0.0  # stochastic-depth rate, the same in every layer as in the released code
    stem: str = "linear"
    stem_norm: str = "none"
    stem_act: str = "none"
    pool: str = "cls"  # what the head reads: the class token, or the mean of the patch tokens (BEiT)
    pos: str = "patches"  # "patches": none for the class token (released code); "all": timm; "relative": BEiT
    init_std: float = 0.02
    inner: int | None = None  # heads x head size; None = width. Wider in what `fuse` makes
    ffn_width: int | None = None  # None = 4 width
    # Released code (BEiT, not the paper's own): for `recipes.BEIT_MODEL`.
    shrink_deep: bool = False  # proj and fc2 of pair l = 1, 2, ... start at 1 / sqrt(2 l) of their values
    head_scale: float = 1.0  # factor on the head's initial weights
    key_bias: bool = True  # False: none on k, whose bias adds the same to all logits of a query, which softmax ignores

    @property
    def pairs(self) -> int:
        """(MHSA, FFN) pairs in the whole model: what Figure 3 has on its x-axis."""
        return self.depth * self.branches

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """N: patches and the class token."""
        return self.grid**2 + 1

    @property
    def name(self) -> str:
        """The canonical name, e.g. "B18x2/16" or "W64-12x1/4"; fused: "B18x1/16 with 24 heads and FFN 6144"."""
        inner, ffn = self.inner or self.width, self.ffn_width or 4 * self.width
        own_heads = self.heads * self.width // inner  # of a model that is not wider than its name says
        sizes = {size: name for name, size in WIDTHS.items()}
        width = sizes.get((self.width, own_heads), f"W{self.width}-")
        wide = f" with {self.heads} heads and FFN {ffn}" if (inner, ffn) != (self.width, 4 * self.width) else ""
        return f"{width}{self.depth}x{self.branches}/{self.patch_size}{wide}"


def vit_config(name: str, **overrides: object) -> ViTConfig:
    """The configuration that a name means, e.g. "B12", "S18x2/16", "W64-6x2/4", with fields overridden by keyword.

    `B12` and `B12x1` are the same model. Ti, S, B and L have the paper's widths and heads and initial standard
    deviation 0.02; W<n> has heads = n / 32 and 0.02 sqrt(768 / n), which keeps the variance of a layer's output
    at that of ViT-B.

    Raises UsageError for a name, a field or a value that does not exist, and for an image size that the patch
    does not divide.
    """
    match = _NAME.fullmatch(str(name))
    if match is None:
        examples = [f"{width}{depth}" for width in WIDTHS for depth in ("12", "24", "36", "18x2", "18x2/16")]
        near = get_close_matches(str(name).upper(), [*examples, "W64-12x1/4", "W64-6x2/4"], n=1, cutoff=0.4)
        raise UsageError(
            f"unknown model {name!r}: allowed are WIDTH DEPTH [xBRANCHES] [/PATCH] with width "
            f"{', '.join(WIDTHS)} or W<n>-, for example {near[0] if near else 'S18x2/16'}"
        )
    letter, number, depth, branches, patch = match.groups()
    if number is None:
        width, heads = WIDTHS[letter]
        std = 0.02
    else:
        width = int(number)
        if width == 0 or width % 32:
            raise UsageError(f"model {name!r} has width {width}: allowed are multiples of 32 (heads = width / 32)")
        heads, std = width // 32, 0.02 * math.sqrt(768 / width)
    known = {f.name for f in fields(ViTConfig)}
    for key in overrides:
        if key not in known:
            raise unknown("model field", key, sorted(known))
    stem = str(overrides.get("stem", "linear"))
    if stem not in STEM_DEFAULTS:
        raise unknown("stem", stem, STEM_DEFAULTS)
    norm, act = STEM_DEFAULTS[stem]
    config = ViTConfig(
        width=width,
        depth=int(depth),
        branches=int(branches or 1),
        heads=heads,
        patch_size=int(patch or 16),
        stem_norm=norm,
        stem_act=act,
        init_std=std,
    )
    return check(replace(config, **overrides))


def check(config: ViTConfig) -> ViTConfig:
    """The same configuration, or a UsageError that names the field that cannot be."""
    for field, allowed in _CHOICES.items():
        if getattr(config, field) not in allowed:
            raise unknown(field, getattr(config, field), allowed)
    for field in ("width", "depth", "branches", "heads", "patch_size", "image_size", "in_chans", "num_classes"):
        value, least = getattr(config, field), 0 if field == "num_classes" else 1  # no classes: no head
        if type(value) is not int or value < least:
            raise UsageError(f"{field} is {value!r}: allowed is a whole number from {least}")
    for field in ("inner", "ffn_width"):
        value = getattr(config, field)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{field} is {value!r}: allowed is None (as the width says) or a whole number from 1")
    for field in ("layer_scale", "drop_path", "init_std", "head_scale"):
        value = getattr(config, field)
        if not isinstance(value, (int, float)) and not (field == "layer_scale" and value is None):
            raise UsageError(f"{field} is {value!r}: allowed is a number")
    for field in ("shrink_deep", "key_bias"):
        if type(getattr(config, field)) is not bool:
            raise UsageError(f"{field} is {getattr(config, field)!r}: allowed are True and False")
    if not config.init_std > 0:
        raise UsageError(f"init_std is {config.init_std!r}: allowed is a positive standard deviation")
    if not config.head_scale > 0:
        raise UsageError(f"head_scale is {config.head_scale!r}: allowed is a positive factor")
    if config.image_size % config.patch_size:
        below = config.image_size // config.patch_size * config.patch_size
        near = [str(size) for size in (below, below + config.patch_size) if size]
        raise UsageError(
            f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}: "
            f"the nearest allowed are {' and '.join(near)}"
        )
    if (config.inner or config.width) % config.heads:
        what = "width" if config.inner is None else "inner"
        raise UsageError(f"{what} {config.inner or config.width} cannot be split into {config.heads} heads")
    if config.layer_scale is not None and not config.layer_scale > 0:
        # timm reads init_values=0 as "no LayerScale"; here that is said with None.
        raise UsageError(f"layer_scale is {config.layer_scale!r}: allowed are None (off) or a positive initial value")
    if not 0 <= config.drop_path < 1:
        raise UsageError(f"drop_path is {config.drop_path!r}: allowed is a rate from 0 up to, not including, 1")
    if config.stem == "conv" and config.patch_size not in (2, 4, 8, 16, 32, 64):
        raise UsageError(f"the convolutional stem has patch_size {config.patch_size}: allowed are 2, 4, 8, 16, 32, 64")
    if config.stem == "local":
        if config.patch_size % 4 or config.width % 32:
            raise UsageError(
                f"the local-transformer stem has patch_size {config.patch_size} and width {config.width}: "
                "allowed are multiples of 4 and of 32"
            )
        if (config.stem_norm, config.stem_act) != STEM_DEFAULTS["local"]:
            raise UsageError(
                "the local-transformer stem has norms and GELUs of its own: stem_norm and stem_act are none"
            )
    if config.stem == "hmlp" and config.width % 4:
        raise UsageError(f"the hMLP stem has hidden width width / 4, and width {config.width} is no multiple of 4")
    return config
