"""What is done to an image that is streamed before a model sees it: the record, and the two views that do it."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import functional as F

from vitlib import draws
from vitlib.errors import UsageError, unknown
from vitlib.records import check_types, floats

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
        floats(self)
        check_types(self)
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
                f"color_jitter is {self.color_jitter} and view_size {self.view_size}: allowed are numbers from 0, and None or "
                "pixels from 1"
            )


ASPECT = (3 / 4, 4 / 3)  # of a random crop, width to height
THIN = 8  # an image's longer side is at most this many times its shorter one
TIMM_POLICIES = {"none": None, "3-augment": "3a"}
Statistics = tuple[float, float, float]


@contextlib.contextmanager
def own_draws(*names: object) -> Iterator[None]:
    """Inside, the global generators on the CPU are a function of `names`; afterwards they are as they were."""
    key = draws.key(*names)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm draws from these
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(key >> 1)  # torch.manual_seed would reach the GPU's generator too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


class TrainView:
    """A random crop as a model sees it and, for a tokenizer, the same crop at another size.

    `view(image, flipped, key)` gives float (3, S, S), normalised, and uint8 (3, V, V) or None. The tokenizer's view has the
    same crop, flip and colours (Released code: BEiT jitters before it cuts the two views) but no erasing.
    """

    def __init__(self, augment: Augment, image_size: int, mean: Statistics, std: Statistics):
        self.scale = augment.crop_scale
        self.sides = [(image_size, str_to_interp_mode(augment.interpolation))]
        if augment.view_size is not None:
            self.sides.append((augment.view_size, str_to_interp_mode("lanczos")))
        # The crop and the flip are drawn here, since timm's do not say what they drew.
        _, self.colours, self.finish = transforms_imagenet_train(
            image_size, color_jitter=augment.color_jitter or None,
            auto_augment=TIMM_POLICIES.get(augment.policy, augment.policy), interpolation=augment.interpolation,
            mean=mean, std=std, re_prob=augment.erasing, re_mode="pixel", separate=True,
        )  # fmt: skip

    def __call__(self, image: Image.Image, flipped: bool, key: int) -> tuple[Tensor, Tensor | None]:
        with own_draws(key, "crop"):
            box = RandomResizedCropAndInterpolation.get_params(image, self.scale, ASPECT)
        views = []
        for side, interpolation in self.sides:
            view = F.resized_crop(image, *box, [side, side], interpolation)
            with own_draws(key, "colours"):  # the same for both views
                views.append(self.colours(F.hflip(view) if flipped else view))
        with own_draws(key, "erasing"):
            return self.finish(views[0]), F.pil_to_tensor(views[1]) if len(views) > 1 else None


class TestView:
    """The middle of an image: its shorter side to image_size / test_crop, then a centre crop, float (3, S, S), normalised."""

    def __init__(self, augment: Augment, image_size: int, mean: Statistics, std: Statistics):
        # 236 for 224 at 0.95, as in mmpretrain's A2 configuration; timm and the released code cut the fraction off (235).
        self.resized = round(image_size / augment.test_crop)
        self.image_size, self.mean, self.std = image_size, mean, std
        self.interpolation = str_to_interp_mode(augment.interpolation)

    def __call__(self, image: Image.Image, flipped: bool, key: int) -> tuple[Tensor, None]:
        # Of a thin image no more than the crop needs: 1 x 20,000 pixels would be enlarged to a gigabyte.
        width, height = (min(side, THIN * min(image.size)) for side in image.size)
        if (width, height) != image.size:
            image = F.center_crop(image, [height, width])
        image = F.center_crop(F.resize(image, self.resized, self.interpolation), self.image_size)
        return F.normalize(F.to_tensor(F.hflip(image) if flipped else image), self.mean, self.std), None
