"""What is done to an image that is read from its file before a model sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Augment:
    """Training: a random resized crop, a mirror flip (`Recipe.flip`), `policy`, colour jitter, erasing. Test: a centre crop.

    A change of any field is another run. The transforms are timm's and torchvision's; the draws belong to the image
    (seed, epoch, index, repeat), never to a worker.
    """

    policy: str = "none"  # timm's name, e.g. "rand-m7-mstd0.5-inc1"; "3-augment" is DeiT III's; "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area that a crop covers
    color_jitter: float = 0.0
    erasing: float = 0.0  # probability that a rectangle is erased
    test_crop: float = 0.95  # the test image's side is image_size / test_crop before the centre crop
    interpolation: str = "bicubic"
    view_size: int | None = None  # a second view of the same crop at this side, for a tokenizer (BEiT: 112, Lanczos)
