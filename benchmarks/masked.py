"""A step of masked pre-training: ours, a straightforward BEiT-style one, and that one with each of our optimizations
alone.

Same model, same weights, same position scheme (the profile's, and BEiT's relative bias shared by all layers), same number
of masked patches, AdamW and clipping. What the straightforward step does as the BEiT code does it (microsoft/unilm, beit:
masking_generator.py, modeling_pretrain.py, engine_for_pretraining.py):

tokens     the tokenizer runs on every batch             ours: looked up once for every image
masks      drawn in Python, image by image               ours: for the whole batch at once
unread     every token goes through the last layer       ours: only the masked ones, which alone are predicted
attention  softmax written out, the N x N maps kept      ours: PyTorch's fused kernel
optimizer  PyTorch's AdamW as it comes                   ours: its fused kernel
relative   the bias is gathered anew in every layer      ours: once a step (models with relative positions)
"""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import main
from lab.bench.runner import Arm, Bench, Case, Reading, take_turns
from lab.cost.count import AttentionAs, counted
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import Profile
from vitlib.data import InMemory
from vitlib.model import ViTConfig, vit_config
from vitlib.model.layers import Reads
from vitlib.train.loop import set_train_mode
from vitlib.train.masked import MaskedLoss, MaskedViT
from vitlib.train.recipe import Recipe
from vitlib.train.tokenizers import VOCABULARY, nearest, patchify

OPTIMIZATIONS = ("tokens", "masks", "unread", "attention", "optimizer", "relative")
IMAGES = 512  # distinct ones; their content does not change the time


def cases(profile: Profile, device: str) -> list[Case]:
    """The profile's own step and, on a GPU, BEiT's: ViT-B at 224 pixels, 75 of 196 patches, 8,192 tokens."""
    masked = arms_of(small.stems, profile)["linear pretrained"].spec.parent
    models = [masked.model, replace(masked.model, pos="relative")]
    every = [_case(model, masked.recipe.batch_size, masked.masked, VOCABULARY, masked.threads) for model in models]
    if device == "cuda":
        large = vit_config("B12", stem="hmlp", pos="relative", layer_scale=0.1, pool="mean")
        every.append(_case(large, 128, 75, 8192, 0))
    return every


def _case(config: ViTConfig, batch: int, masked: int, vocabulary: int, threads: int) -> Case:
    task = {"model": config, "batch": batch, "masked": masked, "vocabulary": vocabulary}
    name = f"{config.name} at {config.image_size} px, pos {config.pos}, {masked} of {config.grid**2} patches, batch {batch}"
    return Case(name, "benchmarks.masked:measure", task, "BEiT-style", 5, threads=threads)


def measure(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    config = task["model"]
    arms = _arms(config)
    seconds = take_turns(
        {name: _step(task, config, optimizations, device, dtype) for name, optimizations in arms.items()}, device
    )
    return {name: Reading(seconds[name], _counted(task, config, optimizations)) for name, optimizations in arms.items()}


def _arms(config: ViTConfig) -> dict[str, frozenset[str]]:
    """Arm -> which of our optimizations it has."""
    every = [name for name in OPTIMIZATIONS if name != "relative" or config.pos == "relative"]
    return {"BEiT-style": frozenset(), **{f"+ {name}": frozenset([name]) for name in every}, "ours": frozenset(every)}


class _Tokens:
    """Targets: the nearest of V prototypes for each patch, looked up (ours) or computed from the images of the batch."""

    def __init__(self, images: Tensor, patch_size: int, vocabulary: int, looked_up: bool):
        generator = torch.Generator(device="cpu").manual_seed(0)
        size = images.shape[1] * patch_size**2
        self.prototypes = torch.randn(vocabulary, size, generator=generator).to(images.device)
        self.patch_size, self.outputs = patch_size, vocabulary
        both = torch.stack([self._of(images), self._of(images.flip(-1))]) if looked_up else None
        self.tokens = both

    def _of(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.patch_size)
        return nearest(patches.flatten(0, 1), self.prototypes).view(patches.shape[:2])

    def __call__(self, batch) -> Tensor:
        if self.tokens is not None:
            return self.tokens[batch.flipped.long(), torch.from_numpy(batch.index)]
        return self._of(batch.images)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predicted, target)


class _Loss(MaskedLoss):
    """`MaskedLoss`, with masks image by image unless `masks` is among the optimizations."""

    def __init__(self, targets: _Tokens, masked: int, optimizations: frozenset[str], device: str):
        super().__init__(targets, 0, masked)
        self.optimizations, self.device, self.random = optimizations, device, random.Random(0)

    def mask(self, grid: int, batch) -> Tensor:
        if "masks" in self.optimizations:
            return super().mask(grid, batch).to(self.device)
        drawn = [image_mask(self.random, grid, self.masked) for _ in batch.index]
        return torch.from_numpy(np.stack(drawn)).flatten(1).to(self.device)


def image_mask(draw: random.Random, grid: int, masked: int) -> np.ndarray:
    """Block-wise mask of one image, bool (grid, grid): rectangles until none fits, the rest patch by patch."""
    mask = np.zeros((grid, grid), dtype=bool)
    least = max(2, round(16 / 196 * grid * grid))
    while (missing := masked - mask.sum()) > 0:
        added = 0
        for _ in range(10):
            area = draw.uniform(min(least, missing), missing)
            aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < grid and 0 < width < grid):
                continue
            top, left = draw.randint(0, grid - height), draw.randint(0, grid - width)
            block = mask[top : top + height, left : left + width]
            if 0 < height * width - block.sum() <= missing:
                added = height * width - block.sum()
                block[:] = True
                break
        if not added:  # BEiT's second version tops up in the same way
            mask.flat[draw.sample(list(np.flatnonzero(~mask)), int(missing))] = True
    return mask


class _Model(MaskedViT):
    """`MaskedViT`, with every token in the last layer, or the bias gathered in every layer, without those optimizations."""

    optimizations: frozenset[str] = frozenset(OPTIMIZATIONS)

    def forward(self, images: Tensor, mask: Tensor, draws: Tensor | None = None) -> Tensor:
        self.vit.skip_unread = "unread" in self.optimizations
        if "relative" in self.optimizations or self.vit.relative is None:
            return super().forward(images, mask, draws)
        relative, layers = self.vit.relative, self.vit.layers
        self.vit.relative, self.vit.layers = None, nn.ModuleList(_Gathers(layer, relative) for layer in layers)
        try:
            return super().forward(images, mask, draws)
        finally:
            self.vit.relative, self.vit.layers = relative, layers


class _Gathers(nn.Module):
    """A layer that gathers the relative bias itself."""

    def __init__(self, layer: nn.Module, relative: nn.Module):
        super().__init__()
        self.layer, self.relative = layer, relative

    def forward(self, x: Tensor, draws: Tensor | None, reads: Reads) -> Tensor:
        return self.layer(x, draws, reads._replace(relative=self.relative()))


def _step(task: dict, config: ViTConfig, optimizations: frozenset[str], device: str, dtype: torch.dtype) -> Arm:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, config.in_chans, config.image_size, config.image_size), generator=generator)
    pixels = pixels.to(torch.uint8)
    mean, std = (torch.full((config.in_chans, 1, 1), value) for value in (0.5, 0.25))
    data = InMemory("noise", "train", pixels, torch.zeros(IMAGES, dtype=torch.int64), ("none",), mean, std, "")
    recipe = Recipe(epochs=1, batch_size=task["batch"], lr=1e-3)
    targets = _Tokens(pixels.float().to(device), config.patch_size, task["vocabulary"], "tokens" in optimizations)
    loss_function = _Loss(targets, task["masked"], optimizations, device)
    model = _Model(config, targets.outputs, 0).to(device)
    model.optimizations = optimizations
    set_train_mode(model)
    fused = True if "optimizer" in optimizations else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    rows, epoch = np.arange(task["batch"]) % IMAGES, iter(range(10**9))

    def fresh():
        batch = next(data.epoch_batches(rows, 0, next(epoch), recipe))
        return replace(batch, images=batch.images.to(device))

    def loss(batch) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            with nullcontext() if "attention" in optimizations else AttentionAs("explicit"):
                return loss_function(model, batch)

    def step(batch) -> None:
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()

    return Arm(fresh, step)


def _counted(task: dict, config: ViTConfig, optimizations: frozenset[str]) -> int:
    """Multiply-adds of a whole step on the CPU, tokenizer and optimizer included, at a batch of at most 64 scaled up."""
    batch = min(task["batch"], 64) if config.image_size < 100 else 1
    arm = _step(task | {"batch": batch}, config, optimizations, "cpu", torch.float32)
    given = arm.fresh()
    return task["batch"] * counted(lambda: arm.step(given)) // batch


if __name__ == "__main__":
    main(Bench("masked", cases), __doc__)
