"""What a model is, as a small frozen record. `vit_config("B18x2/16")` reads the paper's names.

B18x2 has the width of ViT-B, 18 layers and 2 branches per layer: 36 pairs of (MHSA, FFN), the parameters and
multiply-adds of B36x1. Models outside the paper's widths are named by width: `W64-12x2/4` has width 64, 12 layers of 2
branches, 4x4 patches.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches

from vitlib.errors import UsageError, unknown
from vitlib.model.stems import STEMS
from vitlib.records import ABOVE_0, check, floats, number, or_none, truth, whole

# name -> (width, heads). Paper: Table 1, columns "width" and "heads".
WIDTHS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12), "L": (1024, 16)}
_NAME = re.compile(r"(Ti|S|B|L|W(\d{1,6})-)(\d{1,6})(?:x(\d{1,6}))?(?:/(\d{1,6}))?", re.ASCII)


@dataclass(frozen=True)
class ViTConfig:
    """The size and the parts of one Vision Transformer. Raises UsageError for a model that cannot be."""

    width: int  # D, the token's length
    depth: int  # layers, one after the other
    branches: int = 1  # (MHSA, FFN) pairs side by side in each layer; eq. (2) has 2
    heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head
    layer_scale: float | None = None  # initial value; None = off. Released code: 1e-4; the paper gives none
    drop_path: float = 0.0  # stochastic-depth rate, the same in every layer as in the released code
    stem: str = "linear"
    # None = the stem's default (`stems.STEMS`). A value equal to the default is stored as None, so that equal models are equal
    # records, and replace(config, stem=...) takes the new stem's norm and activation.
    stem_norm: str | None = None
    stem_act: str | None = None
    stem_width: int | None = None  # hidden channels of the hMLP stem; None = width / 4
    pool: str = "cls"  # what the head reads: the class token, or the mean of the patch tokens (BEiT)
    pos: str = "patches"  # "patches": none for the class token (released code); "all": timm; "relative": BEiT
    init_std: float = 0.02
    inner: int | None = None  # heads x head size; None = width. Wider in what `fuse` makes
    ffn_width: int | None = None  # None = 4 width
    # Released code (BEiT, not the paper's own):
    shrink_deep: bool = False  # proj and fc2 of pair l = 1, 2, ... start at 1 / sqrt(2 l) of their values
    head_scale: float = 1.0  # factor on the head's initial weights
    key_bias: bool = True  # False: none on k, whose bias adds the same to all logits of a query, which softmax ignores

    def __post_init__(self) -> None:
        floats(self)
        _check(self)
        for field in ("norm", "act"):
            if getattr(self, f"stem_{field}") == getattr(STEMS[self.stem], field):
                object.__setattr__(self, f"stem_{field}", None)

    @property
    def norm(self) -> str:
        """The stem's norm: none, bn or ln."""
        return self.stem_norm or STEMS[self.stem].norm

    @property
    def act(self) -> str:
        """The stem's activation: none or gelu."""
        return self.stem_act or STEMS[self.stem].act

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
        heads = self.heads * self.width // inner  # of one branch, before `fuse`
        sizes = {size: name for name, size in WIDTHS.items()}
        width = sizes.get((self.width, heads), f"W{self.width}-")
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
    known = sorted(f.name for f in fields(ViTConfig))
    for key in overrides:
        if key not in known:
            raise unknown("model field", key, known)
    sizes = {"width": width, "depth": int(depth), "branches": int(branches or 1), "heads": heads}
    return ViTConfig(**sizes | {"patch_size": int(patch or 16), "init_std": std} | overrides)


CHOICES = {
    "stem": STEMS,  # looked up when asked: a stem may be added
    "stem_norm": (None, "none", "bn", "ln"),
    "stem_act": (None, "none", "gelu"),
    "pool": ("cls", "mean"),
    "pos": ("patches", "all", "relative"),
}
RULES = [
    ("width depth branches heads patch_size image_size in_chans", whole(1), "is a whole number from 1"),
    ("num_classes", whole(0), "is a whole number from 0"),
    ("inner ffn_width stem_width", or_none(whole(1)), "is None or a whole number from 1"),
    # timm reads init_values=0 as "no LayerScale"; here that is said with None.
    ("layer_scale", or_none(number(ABOVE_0)), "is None (off) or a positive initial value"),
    ("drop_path", number(0, 1), "is a rate from 0 up to, not including, 1"),
    ("init_std", number(ABOVE_0), "is a positive standard deviation"),
    ("head_scale", number(ABOVE_0), "is a positive factor"),
    ("shrink_deep key_bias", truth, "are True and False"),
]


def _check(config: ViTConfig) -> None:
    """Each field by itself, then what must fit together."""
    check(config, CHOICES, RULES)
    image_size, patch_size, inner = config.image_size, config.patch_size, config.inner or config.width
    if image_size % patch_size:
        below = image_size // patch_size * patch_size
        near = " and ".join(str(size) for size in (below, below + patch_size) if size)
        raise UsageError(
            f"image_size {image_size} is not a multiple of patch_size {patch_size}: the nearest allowed are {near}"
        )
    if inner % config.heads:
        what = "width" if config.inner is None else "inner"
        raise UsageError(f"{what} {inner} cannot be split into {config.heads} heads")
    if config.stem_width is not None and not STEMS[config.stem].hidden:
        raise UsageError(
            f"stem_width is {config.stem_width}: the {config.stem} stem has no hidden width, allowed is None"
        )
    if reason := STEMS[config.stem].refuses(config):
        raise UsageError(reason)
