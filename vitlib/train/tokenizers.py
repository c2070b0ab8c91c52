"""What masked pre-training predicts, behind one interface: fit on training images, targets by image index.

dvae     a patch's token in a discrete VAE trained on the training images, a run of its own (`dvae.py`): the paper's way
tokens   the number of the nearest of V patch prototypes (k-means on the raw patches of the training images): the
         light stand-in
pixels   the patch's own pixels, normalised by its mean and deviation, as in MAE (He et al. 2021)

Images that are read as they are needed are another crop in every epoch: the dVAE then runs on each batch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib import draws
from vitlib.data import Batch, DataSet
from vitlib.errors import UsageError, unknown

VOCABULARY = 128  # scouted: at least as good as 256 on 4x4-pixel patches
SAMPLED_PATCHES = 60_000
ITERATIONS = 25


class Targets(Protocol):
    """What is predicted for each patch."""

    outputs: int  # width of the prediction

    def __call__(self, batch: Batch) -> Tensor:
        """Targets of a batch, (B, patches) or (B, patches, outputs), in the orientation in which it was drawn."""

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean over masked patches: (M, outputs) and the targets of the same patches."""


class Tokenizer(Protocol):
    """A trained model that gives every patch a token."""

    outputs: int  # V, the size of its vocabulary

    def look_up(self, images: Tensor, data: DataSet) -> Tensor:
        """Tokens of uint8 images that come from `data`: (B, C, H, W) -> int64 (B, patches)."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, patches, C * P * P), patches in row-major order."""
    return F.unfold(images.float(), patch_size, stride=patch_size).transpose(1, 2)


class Tokens:
    """Token numbers, looked up once for every image in both orientations: int64 (2, N, patches)."""

    def __init__(self, tokens: Tensor, vocabulary: int):
        self.tokens, self.outputs = tokens, vocabulary

    def __call__(self, batch: Batch) -> Tensor:
        return self.tokens[batch.flipped.long(), torch.from_numpy(batch.index)].to(batch.images.device)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predicted, target)


class PatchTokens(Tokens):
    """k-means tokens."""

    def __init__(self, data: DataSet, patch_size: int, seed: int, vocabulary: int = VOCABULARY):
        patches = patchify(data.pixels(), patch_size) / 255
        flat = patches.reshape(-1, patches.shape[-1])
        sample = draws.order(seed, "k-means sample", 0, len(flat))[:SAMPLED_PATCHES]
        self.prototypes = kmeans(flat[torch.from_numpy(sample)], min(vocabulary, len(sample)), ITERATIONS, seed)
        both = (patches, patchify(data.pixels().flip(-1), patch_size) / 255)
        tokens = [nearest(p.reshape(-1, p.shape[-1]), self.prototypes).view(len(p), -1) for p in both]
        super().__init__(torch.stack(tokens), len(self.prototypes))


class FreshTokens:
    """Tokens of a frozen tokenizer, run on every batch as it comes: for images that are read as they are needed.

    A random crop is another image in every epoch, so nothing can be looked up. The tokenizer sees `batch.view`, the same crop
    at its own size (BEiT: 112 pixels for DALL-E's 8x8 patches beside 224 for 16x16), or else the images themselves.
    """

    def __init__(self, tokenizer: Tokenizer, data: DataSet):
        self.tokenizer, self.data, self.outputs = tokenizer, data, tokenizer.outputs

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        device = batch.images.device
        seen = batch.view
        if seen is None:
            mean, std = self.data.mean.to(device), self.data.std.to(device)
            seen = ((batch.images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return self.tokenizer.look_up(seen, self.data)

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predicted, target)


class NormalisedPixels:
    """A patch's pixels minus their mean, divided by their deviation.

    Released code of MAE: models_mae.py, unbiased variance, epsilon 1e-6, mean squared error.
    """

    def __init__(self, data: DataSet, patch_size: int):
        self.patch_size = patch_size
        self.outputs = data.channels * patch_size**2

    def __call__(self, batch: Batch) -> Tensor:
        pixels = patchify(batch.images, self.patch_size)
        return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(predicted, target)


TARGETS = ("tokens", "pixels", "dvae")
LOOKED_UP = 500  # images at a time


def make_targets(kind: str, data: DataSet, patch_size: int, seed: int, tokenizer: Tokenizer | None = None) -> Targets:
    """Raises UsageError for an unknown kind, for a learned one without its tokenizer, and for k-means on images that are
    not in memory.
    """
    if kind not in TARGETS:
        raise unknown("targets", kind, TARGETS)
    if kind == "dvae":
        if tokenizer is None:
            raise UsageError(f"targets {kind!r} need a tokenizer")
        if data.streamed:
            return FreshTokens(tokenizer, data)
        both = (data.pixels(), data.pixels().flip(-1))
        tokens = [torch.cat([tokenizer.look_up(part, data) for part in images.split(LOOKED_UP)]) for images in both]
        return Tokens(torch.stack(tokens), tokenizer.outputs)
    if kind == "tokens" and data.streamed:
        raise UsageError(f"targets 'tokens' need images in memory, {data.name} is streamed: allowed are dvae, pixels")
    return PatchTokens(data, patch_size, seed) if kind == "tokens" else NormalisedPixels(data, patch_size)


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


def usage(tokens: np.ndarray | Tensor, vocabulary: int) -> Tensor:
    """Share of each token, float (V,): how much of the vocabulary is in use."""
    counts = torch.bincount(torch.as_tensor(tokens).flatten(), minlength=vocabulary)
    return counts / counts.sum()


def codebook_use(tokens: np.ndarray | Tensor, vocabulary: int) -> dict[str, float]:
    """The share of the vocabulary that is in use at all, and its perplexity: so many tokens used equally often would
    have the same entropy.
    """
    share = usage(tokens, vocabulary).double()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"tokens_used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}
