"""What is done to an image that is read from its file before a model sees it: the record. `views.py` does it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vitlib.errors import UsageError, unknown

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")
RAND_AUGMENT = re.compile(r"rand(-(m|n|p|mstd|mmax|inc)\d[\d.]*)*")


@dataclass(frozen=True)
class Augment:
    """Training: a random resized crop, a mirror flip (`Recipe.flip`), `policy`, colour jitter, erasing. Test: a centre crop.

    A change of any field is another run. The transforms are timm's and torchvision's; the draws belong to the image
    (seed, epoch, index, repeat), never to a worker. As in timm and the released code, RandAugment leaves no room for colour
    jitter: beside a "rand-..." policy `color_jitter` does nothing.

    Raises UsageError for a policy or an interpolation that does not exist and for a share outside (0, 1].
    """

    policy: str = "none"  # timm's name, e.g. "rand-m7-mstd0.5-inc1"; "3-augment" is DeiT III's; "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area that a crop covers
    color_jitter: float = 0.0
    erasing: float = 0.0  # probability that a rectangle is erased
    test_crop: float = 0.95  # the test image's side is image_size / test_crop before the centre crop
    interpolation: str = "bicubic"
    view_size: int | None = None  # a second view of the same crop at this side, for a tokenizer (BEiT: 112, Lanczos)

    def __post_init__(self) -> None:
        if self.policy not in ("none", "3-augment") and not RAND_AUGMENT.fullmatch(self.policy):
            raise unknown("policy", self.policy, ("none", "3-augment", "rand-m7-mstd0.5-inc1 and its like"))
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        smallest, largest = self.crop_scale
        if not (0 < smallest <= largest <= 1 and 0 < self.test_crop <= 1 and 0 <= self.erasing <= 1):
            raise UsageError(
                f"crop_scale {self.crop_scale}, test_crop {self.test_crop} and erasing {self.erasing} are shares: allowed are "
                "numbers in (0, 1], smaller before larger, and 0 for erasing"
            )
        if self.color_jitter < 0 or (self.view_size is not None and self.view_size < 1):
            raise UsageError(
                f"color_jitter {self.color_jitter} is from 0 and view_size {self.view_size} None or a number of pixels"
            )
