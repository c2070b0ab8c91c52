"""The paper's tokenizer: a discrete variational autoencoder, trained on the training images alone.

    image -> encoder -> logits over V tokens at each patch -> Gumbel-softmax -> codebook -> decoder -> image

Paper: the tokens of a discrete VAE trained on ImageNet-1k take the place of DALL-E's; its details are those of El-Nouby
et al. (2021) and not written out. Here: a small convolutional one. While it trains, a patch's token is a relaxed sample,
softmax((logits + Gumbel noise) / temperature), whose temperature falls until it is nearly one-hot (Jang et al. 2017;
Ramesh et al. 2021, appendix A.2); afterwards it is the argmax of the logits. B images, C channels, V tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib import draws
from vitlib.data import Batch, DataSet
from vitlib.draws import key
from vitlib.errors import UsageError
from vitlib.records import ABOVE_0, check, floats, number, two, whole
from vitlib.train.engine import CPU, Engine
from vitlib.train.protocol import LossFunction, Protocol
from vitlib.train.tokenizers import codebook_use

CHUNK = 2**24  # numbers drawn at a time: 128 MiB in 64 bits
SMALLEST = 2.0**-54  # in place of a uniform number that is 0
RULES = [
    ("image_size patch_size in_chans", whole(1), "are whole numbers from 1"),
    ("vocabulary width", whole(2), "are whole numbers from 2"),
    ("temperature", two(number(ABOVE_0)), "are two above 0"),
    ("kl_weight", number(0), "are numbers from 0"),
]


@dataclass(frozen=True)
class DVAEConfig:
    """The size of one tokenizer, and how it is annealed. A change of any field is another run."""

    image_size: int
    patch_size: int  # one token per patch; in BEiT 8x8 pixels of an image at half the model's size
    in_chans: int
    vocabulary: int = 128  # V; BEiT's 8192 belong to millions of larger images
    width: int = 64  # D: channels of every hidden map, and length of a codebook vector
    temperature: tuple[float, float] = (1.0, 1 / 16)  # first and last, on a cosine: Ramesh et al. 2021
    # At 0.02, 96 to 98 % of 128 tokens are in use after 4 epochs of 18,000 Fashion-MNIST images at 16x16; at 0 and a lower
    # rate 7 %; at 0.03 as many, with 10 % more error. Ramesh et al. have another error and another weight.
    kl_weight: float = 0.02

    # What the loop asks of every model.
    drop_path: ClassVar[float] = 0.0
    pairs: ClassVar[int] = 0

    def __post_init__(self) -> None:
        floats(self)
        check(self, {}, RULES)
        if self.image_size % self.patch_size:
            raise UsageError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def name(self) -> str:
        return f"dVAE-{self.vocabulary}x{self.width}/{self.patch_size}"


class Block(nn.Module):
    """A residual 3x3 convolution, (B, D, grid, grid) -> the same: a token may see the patches around its own."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(F.relu(self.conv(F.relu(x))))


class DVAE(nn.Module):
    """`DVAE(config)(images)` gives the reconstructions from hard tokens: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, config: DVAEConfig, seed: int = 0):
        super().__init__()
        C, P, D, V = config.in_chans, config.patch_size, config.width, config.vocabulary
        self.config, self.outputs = config, V
        self.encoder = nn.Sequential(nn.Conv2d(C, D, P, P), Block(D), Block(D), nn.ReLU(), nn.Conv2d(D, V, 1))
        self.codebook = nn.Parameter(torch.empty(V, D))
        self.decoder = nn.Sequential(Block(D), Block(D), nn.ReLU(), nn.Conv2d(D, C * P * P, 1), nn.PixelShuffle(P))
        # Training steps so far, which the temperature depends on; kept with the weights, as batch norm keeps its count.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(key(seed, "init", "dvae") >> 1)
        for tensor in () if self.codebook.is_meta else self.parameters():
            if tensor is self.codebook:
                nn.init.normal_(tensor, generator=generator)
            elif tensor.ndim > 1:
                nn.init.kaiming_uniform_(tensor, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(tensor)

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W), normalised -> (B, patches, V), patches in row-major order."""
        return self.encoder(images).flatten(2).transpose(1, 2)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> int64 (B, patches)."""
        return self.logits(images).argmax(dim=-1)

    @torch.no_grad()
    def look_up(self, images: Tensor, data: DataSet) -> Tensor:
        """Tokens of uint8 images that come from `data`: (B, C, H, W) -> int64 (B, patches)."""
        return self.tokens(data.normalise(images.to(self.codebook.device)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codebook vectors of every patch, (B, patches, D) -> (B, C, H, W)."""
        return self.decoder(codes.transpose(1, 2).unflatten(2, (self.config.grid, -1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.codebook[self.tokens(images)])

    def no_weight_decay(self) -> set[str]:
        return {"codebook"}


class DVAELoss:
    """Loss function for `train.loop`: squared error of the reconstruction + kl_weight * KL(token || uniform).

    The error is the mean over pixels, normalised to unit variance over the data set; the KL, in nats, the mean over
    patches. KL to the uniform distribution is log V minus the entropy of a patch's distribution over tokens: it keeps
    tokens alive that are not chosen yet.
    """

    def __init__(self, seed: int, steps: int):
        self.seed, self.steps = seed, steps

    def temperature(self, model: DVAE) -> float:
        first, last = model.config.temperature
        share = min(int(model.step) / max(self.steps - 1, 1), 1.0)
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    def __call__(self, model: DVAE, batch: Batch, draws: Tensor | None = None) -> Tensor:
        # encoder: (B, C, H, W) -> (B, patches, V)
        logits = model.logits(batch.images)
        # relaxed samples of the tokens, decoded from their mixtures of codebook vectors
        noise = gumbel(self.seed, batch.epoch, batch.index, logits[0].numel(), logits.device).view_as(logits)
        sample = ((logits + noise) / self.temperature(model)).softmax(dim=-1)
        error = F.mse_loss(model.decode(sample @ model.codebook), batch.images)
        # divergence of each patch's distribution from the uniform one
        log_q = logits.log_softmax(dim=-1)
        kl = math.log(model.config.vocabulary) + (log_q.exp() * log_q).sum(-1).mean()
        model.step += batch.last  # a batch may come in parts
        return error + model.config.kl_weight * kl


def gumbel(seed: int, epoch: int, index: np.ndarray, n: int, device: torch.device | str = "cpu") -> Tensor:
    """n standard Gumbel draws for each image, float32 (B, n): -log(-log u).

    Drawn where they are needed, a chunk of images at a time: at ImageNet's size a batch has 822 million, a minute's work
    for the host. In float64: in float32 a u near 1 would become 1, and its draw infinite.
    """
    noise, images = torch.empty(len(index), n, device=device), max(CHUNK // n, 1)
    for start in range(0, len(index), images):
        part = slice(start, start + images)
        u = draws.uniform_on(device, seed, "gumbel", epoch, index[part], n)
        noise[part] = u.clamp_(min=SMALLEST).log_().neg_().log_().neg_()
    return noise


@torch.no_grad()
def evaluate(model: DVAE, data: DataSet, engine: Engine = CPU) -> tuple[dict[str, float], None]:
    """With hard tokens: mean squared error of pixels between 0 and 1 (`recon_mse`), and how much of the codebook is used."""
    device = model.codebook.device
    std, error, pixels, seen = data.std.to(device), 0.0, 0, []
    for batch in data.evaluation_batches(500):
        images = batch.images.to(device)
        seen.append(model.tokens(images))
        decoded = model.decode(model.codebook[seen[-1]])
        error += F.mse_loss(decoded * std, images * std, reduction="sum").item()
        pixels += images.numel()
    return {"recon_mse": error / pixels} | codebook_use(torch.cat(seen), model.config.vocabulary), None


def start(spec: Any, *_: object) -> tuple[DVAE, LossFunction]:
    """A tokenizer with fresh weights, and its loss."""
    return DVAE(spec.model, spec.seed), DVAELoss(spec.seed, spec.steps)


PROTOCOL = Protocol("tokenizer", start, evaluate, DVAEConfig, classifies=False)
