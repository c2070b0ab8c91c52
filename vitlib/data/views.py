"""From one decoded image to the tensor that a model sees: crops, colours, erasing, and the centre crop of a test image.

The transforms are timm's and torchvision's. They draw from the global generators of Python, numpy and torch, which are
set from the image's own key before each step and put back behind it, so that a view is a function of its key alone.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import functional as F

from vitlib import draws
from vitlib.data.augment import Augment

ASPECT = (3 / 4, 4 / 3)  # of a random crop, width to height
TIMM_POLICIES = {"none": None, "3-augment": "3a"}
Statistics = tuple[float, float, float]


@contextlib.contextmanager
def own_draws(*names: object) -> Iterator[None]:
    """Inside, the global generators on the CPU are a function of `names`; behind it they are as they were."""
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
        image = F.center_crop(F.resize(image, self.resized, self.interpolation), self.image_size)
        return F.normalize(F.to_tensor(F.hflip(image) if flipped else image), self.mean, self.std), None
