"""Thing 3's other half: BEiT-style masked pre-training (section 5; BEiT, Bao et al. 2021).

Block-wise masks; the mask token takes a patch's place after the stem; the loss counts masked patches only.
`mask` is boolean, True = masked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlib import draws
from vitlib.data import Batch, DataSet
from vitlib.draws import key
from vitlib.errors import UsageError
from vitlib.model import ViT, ViTConfig, set_execution
from vitlib.train.protocol import LossFunction, Protocol
from vitlib.train.tokenizers import Targets, make_targets

MIN_BLOCK = 16 / 196  # Released code (BEiT): blocks of at least 16 of 196 patches, aspect ratio 0.3 to 1 / 0.3
MIN_ASPECT = 0.3
TRIES = 10  # proposals until a block is taken; after as many failures the rest is masked patch by patch
PROPOSALS = 40  # per image, all blocks together; of 20,000 images at 14x14 one would use more


def block_masks(seed: int, epoch: int, index: np.ndarray, grid: int, masked: int) -> np.ndarray:
    """Block-wise masks with exactly `masked` patches each: image indices (B,) -> bool (B, grid * grid).

    Released code: beit2/masking_generator.py, the second version, which tops up to the exact count (the first stops
    early and masks 75 of 196 in only 68 % of draws). The same distribution, drawn for the whole batch at once: every
    image that lacks patches proposes a rectangle, and takes it if it masks something new and not too much. A function
    of (seed, epoch, image index).

    Raises UsageError if `masked` is not between 1 and the number of patches - 1.
    """
    patches = grid * grid
    if not 0 < masked < patches:
        raise UsageError(f"{masked} of {patches} patches cannot be masked: allowed are 1 to {patches - 1}")
    # Uniform numbers per image: four for each proposal, then one for each patch.
    u = draws.uniform(seed, "mask", epoch, index, 4 * PROPOSALS + patches)
    proposals = u[:, : 4 * PROPOSALS].reshape(len(index), PROPOSALS, 4).transpose(1, 2, 0)  # (PROPOSALS, 4, B)
    mask = np.zeros((len(index), grid, grid), dtype=bool)
    missing = np.full(len(index), masked)
    failures = np.zeros(len(index), dtype=int)  # since the image's last block
    place, smallest = np.arange(grid), max(2.0, MIN_BLOCK * patches)
    for proposal in proposals:
        todo = np.flatnonzero((missing > 0) & (failures < TRIES))
        if not len(todo):
            break
        area, aspect, top, left = proposal[:, todo]
        # An area between the smallest block and the number of missing patches, whichever of the two is larger.
        area = smallest + area * (missing[todo] - smallest)
        aspect = MIN_ASPECT ** (1 - 2 * aspect)  # log-uniform
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        top, left = np.floor(top * (grid - height + 1)), np.floor(left * (grid - width + 1))
        rows = (place >= top[:, None]) & (place < (top + height)[:, None])
        columns = (place >= left[:, None]) & (place < (left + width)[:, None])
        added = rows[:, :, None] & columns[:, None, :] & ~mask[todo]  # (images, grid, grid)
        count = added.sum(axis=(1, 2))
        # Height and width stay below the grid's side, as in BEiT; a larger block is proposed again.
        taken = (np.maximum(height, width) < grid) & (count > 0) & (count <= missing[todo])
        mask[todo[taken]] |= added[taken]
        missing[todo[taken]] -= count[taken]
        failures[todo] = np.where(taken, 0, failures[todo] + 1)
    # The exact count: masked patches first, then the others in random order; the first `masked` of them are the mask.
    flat = mask.reshape(len(index), patches)
    order = np.argsort(np.where(flat, -1.0, u[:, 4 * PROPOSALS :]), axis=1, kind="stable")
    exact = np.zeros_like(flat)
    np.put_along_axis(exact, order[:, :masked], True, axis=1)
    return exact


class MaskedViT(nn.Module):
    """A ViT without head, a mask token, and a linear predictor for each patch."""

    def __init__(self, config: ViTConfig, outputs: int, seed: int = 0, blank: bool = False):
        super().__init__()
        self.config, self.blank = config, blank
        self.vit = ViT(replace(config, num_classes=0), seed)
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.predictor = nn.Linear(config.width, outputs)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(key(seed, "init", "masked") >> 1)
            nn.init.trunc_normal_(self.mask_token, std=config.init_std, generator=generator)
            nn.init.trunc_normal_(self.predictor.weight, std=config.init_std, generator=generator)
            nn.init.zeros_(self.predictor.bias)

    def forward(self, images: Tensor, mask: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, C, H, W), bool (B, patches) -> (masked patches of the batch, outputs), in `mask.nonzero()` order.

        The stem sees the whole image, as in BEiT: with a stem that keeps patches independent this is the same as
        masking pixels (up to batch norm's statistics in training); with the convolutional stem masked pixels leak,
        unless `blank` replaces them by the training images' mean, 0, before the stem.
        """
        counts = mask.sum(dim=1)
        if (counts != counts[:1]).any():
            raise ValueError(f"every image masks the same number of patches; these mask {counts.tolist()}")
        if self.blank:
            images = images.masked_fill(pixels(mask, self.config.grid, self.config.patch_size), 0.0)
        # the stem: (B, C, H, W) -> (B, patches, D)
        x = self.vit.embed(images)
        # the mask token takes the place of masked patches
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        # layers; of the last one only masked tokens are computed: (B, M, D)
        places = mask.nonzero()[:, 1].view(len(mask), int(counts[0]) if len(mask) else 1)
        x = self.vit.encode(x, draws, places + 1)  # the class token is token 0
        # one prediction per masked patch: (B * M, outputs)
        return self.predictor(x).flatten(0, 1)

    def no_weight_decay(self) -> set[str]:
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}


def pixels(mask: Tensor, grid: int, patch_size: int) -> Tensor:
    """The pixels of masked patches: bool (B, grid * grid) -> bool (B, 1, H, W)."""
    square = mask.view(-1, 1, grid, grid)
    return square.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


class MaskedLoss:
    """Loss function for `train.loop`: draws the masks, predicts, compares with the targets of masked patches."""

    def __init__(self, targets: Targets, seed: int, masked: int):
        self.targets, self.seed, self.masked = targets, seed, masked

    def mask(self, grid: int, batch: Batch) -> Tensor:
        return torch.from_numpy(block_masks(self.seed, batch.epoch, batch.index, grid, self.masked))

    def __call__(self, model: MaskedViT, batch: Batch, draws: Tensor | None = None) -> Tensor:
        # masks by image index: bool (B, patches)
        mask = self.mask(model.config.grid, batch).to(batch.images.device)
        # targets of masked patches, (B * M,) tokens or (B * M, outputs); a tokenizer always runs in full precision
        with torch.autocast(batch.images.device.type, enabled=False):
            targets = self.targets(batch)[mask]
        # predictions in the same order: (B * M, outputs)
        predicted = model(batch.images, mask, draws)
        return self.targets.loss(predicted, targets)


def start(spec: Any, data: DataSet, _: None, tokenizer: nn.Module | None) -> tuple[MaskedViT, LossFunction]:
    """A model with fresh weights, and the loss on masked patches."""
    targets = make_targets(spec.targets, data, spec.model.patch_size, spec.seed, tokenizer)
    model = MaskedViT(spec.model, targets.outputs, spec.seed, spec.blank)
    set_execution(model.vit, spec.execution)
    return model, MaskedLoss(targets, spec.seed, spec.masked)


def predictor(model: MaskedViT) -> dict[str, Tensor]:
    """Mask token and predictor: the weights that fine-tuning does without."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vit.")}


# Not evaluated: a pre-trained model is judged by what its fine-tuned classifier reaches.
PROTOCOL = Protocol(
    "masked", start, lambda *_: ({}, None), classifies=False, keeps=lambda model: model.vit, predictor=predictor
)
