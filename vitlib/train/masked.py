"""Thing 3's other half: BEiT-style masked pre-training (section 5; BEiT, Bao et al. 2021).

Block-wise masks; the mask token takes a patch's place behind the stem; the loss counts masked patches only.
`mask` is boolean, True = masked.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from vitlib import draws
from vitlib.data import Batch, DataSet
from vitlib.draws import key
from vitlib.errors import UsageError
from vitlib.model import ViT, ViTConfig, set_execution
from vitlib.train.engine import CPU, Engine
from vitlib.train.protocol import LossFunction, Protocol, Setting
from vitlib.train.tokenizers import Targets, make_targets

ATTEMPTS = 12  # blocks proposed an image before what is missing is filled up patch by patch
MIN_BLOCK = 16 / 196  # Released code (BEiT): blocks of at least 16 of 196 patches, aspect ratio 0.3 to 1 / 0.3
MIN_ASPECT = 0.3


def block_masks(seed: int, epoch: int, index: np.ndarray, grid: int, masked: int) -> np.ndarray:
    """Block-wise masks with exactly `masked` patches each: image indices (B,) -> bool (B, grid * grid).

    Each image proposes rectangles of random area and aspect; one is taken if it does not mask too many. What is
    missing at the end is filled with single patches (BEiT's second version tops up too; its first stops early and masks
    75 of 196 in only 68 % of draws). A function of (seed, epoch, image index).

    Raises UsageError if `masked` is not between 1 and the number of patches - 1.
    """
    patches = grid * grid
    if not 0 < masked < patches:
        raise UsageError(f"{masked} of {patches} patches cannot be masked: allowed are 1 to {patches - 1}")
    u = draws.uniform(seed, "mask", epoch, index, 4 * ATTEMPTS + patches)
    mask = np.zeros((len(index), grid, grid), dtype=bool)
    place = np.arange(grid)
    smallest = max(2.0, MIN_BLOCK * patches)
    for area, aspect, top, left in u[:, : 4 * ATTEMPTS].reshape(len(index), ATTEMPTS, 4).transpose(1, 2, 0):
        area = smallest + area * max(masked - smallest, 0)
        aspect = np.exp((2 * aspect - 1) * -np.log(MIN_ASPECT))
        # Released code: height and width stay below the grid's side.
        height = np.clip(np.rint(np.sqrt(area * aspect)), 1, max(grid - 1, 1))
        width = np.clip(np.rint(np.sqrt(area / aspect)), 1, max(grid - 1, 1))
        top, left = np.floor(top * (grid - height + 1)), np.floor(left * (grid - width + 1))
        rows = (place >= top[:, None]) & (place < (top + height)[:, None])
        columns = (place >= left[:, None]) & (place < (left + width)[:, None])
        proposed = mask | (rows[:, :, None] & columns[:, None, :])
        fits = proposed.sum(axis=(1, 2)) <= masked
        mask[fits] = proposed[fits]
    flat = mask.reshape(len(index), patches)
    # Masked patches first, then the others in random order: the first `masked` of them are the mask.
    rank = np.argsort(np.where(flat, -1.0, u[:, 4 * ATTEMPTS :]), axis=1, kind="stable")
    exact = np.zeros_like(flat)
    np.put_along_axis(exact, rank[:, :masked], True, axis=1)
    return exact


class MaskedViT(nn.Module):
    """A ViT without head, a mask token, and a linear predictor for each patch."""

    def __init__(self, config: ViTConfig, outputs: int, seed: int = 0):
        super().__init__()
        self.config = config
        self.vit = ViT(replace(config, num_classes=0), seed)
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.predictor = nn.Linear(config.width, outputs)
        with torch.no_grad():
            own = torch.Generator().manual_seed(key(seed, "init", "masked") >> 1)
            nn.init.trunc_normal_(self.mask_token, std=config.init_std, generator=own)
            nn.init.trunc_normal_(self.predictor.weight, std=config.init_std, generator=own)
            nn.init.zeros_(self.predictor.bias)

    def forward(self, images: Tensor, mask: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, C, H, W), bool (B, patches) -> (masked patches of the batch, outputs), in `mask.nonzero()` order.

        The stem sees the whole image, as in BEiT: with a stem that keeps patches independent this is the same as
        masking pixels (up to batch norm's statistics in training); with the convolutional stem masked pixels leak.
        """
        x = self.vit.embed(images)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        counts = mask.sum(dim=1)
        if (counts != counts[0]).any():
            raise ValueError(f"every image masks the same number of patches; these mask {counts.tolist()}")
        masked = mask.nonzero()[:, 1].view(len(mask), -1) + 1  # the class token is token 0
        return self.predictor(self.vit.encode(x, draws, masked)).flatten(0, 1)

    def no_weight_decay(self) -> set[str]:
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}


class MaskedLoss:
    """Loss function for `train.loop`: draws the masks, predicts, compares with the targets of masked patches."""

    def __init__(self, targets: Targets, seed: int, masked: int):
        self.targets, self.seed, self.masked = targets, seed, masked

    def mask(self, grid: int, batch: Batch) -> Tensor:
        return torch.from_numpy(block_masks(self.seed, batch.epoch, batch.index, grid, self.masked))

    def __call__(self, model: MaskedViT, batch: Batch, draws: Tensor | None = None) -> Tensor:
        mask = self.mask(model.config.grid, batch).to(batch.images.device)
        with torch.autocast(
            batch.images.device.type, enabled=False
        ):  # a tokenizer's answer is the same at any precision
            targets = self.targets(batch)[mask]
        return self.targets.loss(model(batch.images, mask, draws), targets)


def start(setting: Setting) -> tuple[MaskedViT, LossFunction]:
    """A model with fresh weights, and the loss on masked patches."""
    tokenizer = setting.tokenizer and setting.tokenizer.to(setting.device)
    targets = make_targets(setting.targets, setting.data, setting.model.patch_size, setting.seed, tokenizer)
    model = MaskedViT(setting.model, targets.outputs, setting.seed)
    set_execution(model.vit, setting.execution)
    return model, MaskedLoss(targets, setting.seed, setting.masked)


def evaluate(model: MaskedViT, data: DataSet, engine: Engine = CPU) -> tuple[dict[str, float], None]:
    """Nothing: a pre-trained model is judged by what its fine-tuned classifier reaches."""
    return {}, None


PROTOCOL = Protocol("masked", start, evaluate, classifies=False, keeps=lambda model: model.vit)
