"""What masked pre-training predicts for each patch: fit on training images, targets by image index.

dvae     its token in a discrete VAE trained on the training images by a run of its own (`dvae.py`): the paper's way
tokens   the nearest of V prototypes, k-means on the training images' raw patches: the light stand-in
pixels   its pixels, normalised by their mean and standard deviation, as in MAE (He et al. 2021)

Streamed images are cropped anew in every epoch: the dVAE then runs on each batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib import draws
from vitlib.data import Batch, DataSet
from vitlib.errors import UsageError, unknown

VOCABULARY = 128  # scouted: at least as good as 256 on 4x4-pixel patches
SAMPLED_PATCHES = 60_000
ITERATIONS = 25
LOOKED_UP = 500  # images at a time


class Targets(Protocol):
    """What is predicted for each patch. B images, M masked patches of the batch."""

    outputs: int  # width of a prediction

    def __call__(self, batch: Batch) -> Tensor:
        """Targets of a batch, (B, patches) or (B, patches, outputs), in the orientation in which it was drawn."""

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean over masked patches: (M, outputs), and (M,) or (M, outputs) -> a scalar."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, patches, C * P * P), patches in row-major order."""
    return F.unfold(images.float(), patch_size, stride=patch_size).transpose(1, 2)


class Tokens:
    """Token numbers, looked up once for every image in both orientations: int64 (2, N, patches).

    look_up: uint8 (B, C, H, W) -> int64 (B, patches). Raises UsageError where images are not held in memory.
    """

    loss = staticmethod(F.cross_entropy)

    def __init__(self, data: DataSet, look_up: Callable[[Tensor], Tensor], vocabulary: int):
        both = (data.pixels(), data.pixels().flip(-1))
        tokens = [torch.cat([look_up(part) for part in images.split(LOOKED_UP)]) for images in both]
        self.tokens, self.outputs = torch.stack(tokens), vocabulary

    def __call__(self, batch: Batch) -> Tensor:
        return self.tokens[batch.flipped.long(), torch.from_numpy(batch.index)].to(batch.images.device)


class PatchTokens(Tokens):
    """k-means tokens."""

    def __init__(self, data: DataSet, patch_size: int, seed: int, vocabulary: int = VOCABULARY):
        points = patchify(data.pixels(), patch_size).flatten(0, 1) / 255  # (N * patches, C * P * P)
        sample = draws.order(seed, "k-means sample", 0, len(points))[:SAMPLED_PATCHES]
        self.patch_size = patch_size
        self.prototypes = kmeans(points[torch.from_numpy(sample)], min(vocabulary, len(sample)), ITERATIONS, seed)
        super().__init__(data, self.look_up, len(self.prototypes))

    def look_up(self, images: Tensor) -> Tensor:
        patches = patchify(images, self.patch_size) / 255
        return nearest(patches.flatten(0, 1), self.prototypes).view(patches.shape[:2])

    def decode(self, tokens: Tensor) -> Tensor:
        """Each patch as its prototype: (B, patches) -> (B, C, H, W), from 0 to 1."""
        size = math.isqrt(tokens.shape[1]) * self.patch_size
        return F.fold(self.prototypes[tokens].transpose(1, 2), size, self.patch_size, stride=self.patch_size)


class FreshTokens:
    """Tokens of a trained tokenizer, run on every batch: for streamed images.

    A random crop is another image in every epoch, so nothing can be looked up. The tokenizer sees `batch.view`, the same
    crop at its own size (BEiT: 112 pixels beside the model's 224), or else the images themselves.
    """

    loss = staticmethod(F.cross_entropy)

    def __init__(self, data: DataSet, tokenizer: nn.Module):
        self.tokenizer, self.data, self.outputs = tokenizer, data, tokenizer.outputs

    def __call__(self, batch: Batch) -> Tensor:
        seen = batch.view
        if seen is None:  # back to uint8
            mean, std = (statistic.to(batch.images.device) for statistic in (self.data.mean, self.data.std))
            seen = ((batch.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return self.tokenizer.look_up(seen, self.data)


class NormalisedPixels:
    """A patch's pixels minus their mean, divided by their standard deviation.

    Released code of MAE: models_mae.py, unbiased variance, epsilon 1e-6, mean squared error.
    """

    loss = staticmethod(F.mse_loss)

    def __init__(self, data: DataSet, patch_size: int):
        self.patch_size, self.outputs = patch_size, data.channels * patch_size**2

    def __call__(self, batch: Batch) -> Tensor:
        pixels = patchify(batch.images, self.patch_size)
        return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


TARGETS = ("tokens", "pixels", "dvae")


def make_targets(kind: str, data: DataSet, patch_size: int, seed: int, tokenizer: nn.Module | None = None) -> Targets:
    """tokenizer: for "dvae", a trained model with `outputs` and `look_up` (see `dvae.DVAE`).

    Raises UsageError for an unknown kind, for "dvae" without a tokenizer, and for k-means on streamed images.
    """
    if kind not in TARGETS:
        raise unknown("targets", kind, TARGETS)
    if kind == "pixels":
        return NormalisedPixels(data, patch_size)
    if kind == "dvae":
        if tokenizer is None:
            raise UsageError("targets 'dvae' need a tokenizer")
        if data.streamed:
            return FreshTokens(data, tokenizer)
        return Tokens(data, lambda images: tokenizer.look_up(images, data), tokenizer.outputs)
    if data.streamed:
        raise UsageError(f"targets 'tokens' need images in memory, {data.name} is streamed: allowed are dvae, pixels")
    return PatchTokens(data, patch_size, seed)


def nearest(points: Tensor, prototypes: Tensor) -> Tensor:
    """Index of the nearest prototype: (M, d), (V, d) -> int64 (M,)."""
    half = prototypes.square().sum(1) / 2
    return torch.cat([(half - part @ prototypes.T).argmin(dim=1) for part in points.split(16_384)])


def kmeans(points: Tensor, count: int, iterations: int, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from k-means++ seeds: (M, d) -> (V, d); a function of (points, seed).

    scipy and scikit-learn have this too; training must also run where only torch, numpy and timm are.
    """
    u = draws.uniform(seed, "k-means++", 0, np.arange(1), count)[0]
    chosen = [int(u[0] * len(points))]
    gap = (points - points[chosen[0]]).square().sum(1).double()
    for share in u[1:]:
        # The next seed is drawn in proportion to the squared distance to the nearest one so far.
        total = gap.cumsum(0)
        chosen.append(int(torch.searchsorted(total, share * total[-1], right=True).clamp(max=len(points) - 1)))
        gap = torch.minimum(gap, (points - points[chosen[-1]]).square().sum(1).double())
    prototypes = points[chosen].clone()
    for _ in range(iterations):
        member = nearest(points, prototypes)
        sums = torch.zeros_like(prototypes).index_add_(0, member, points)
        sizes = torch.bincount(member, minlength=count)
        prototypes = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], prototypes)
    return prototypes


def codebook_use(tokens: Tensor, vocabulary: int) -> dict[str, float]:
    """The share of the vocabulary in use, and its perplexity: the number of equally frequent tokens of the same entropy."""
    share = torch.bincount(tokens.flatten(), minlength=vocabulary).double() / tokens.numel()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"tokens_used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}
