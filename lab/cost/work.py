"""What one training run has to do and to hold, counted before anything starts: multiply-adds and bytes.

`job(spec)` leaves of a run what its cost depends on; everything else is arithmetic on `measure`'s counts, which run on
the meta device, so that ViT-L at 384 pixels takes about a second to know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lab.cost import count
from lab.runs.spec import RunSpec
from vitlib.model import ViT, ViTConfig
from vitlib.train.dvae import DVAE, DVAEConfig
from vitlib.train.finetune import freeze
from vitlib.train.recipe import Recipe
from vitlib.train.tokenizers import VOCABULARY


@dataclass(frozen=True)
class Job:
    """A training run as far as its cost goes, the same for every seed. `job(spec)` makes it, or anyone by hand."""

    protocol: str
    model: ViTConfig | DVAEConfig
    recipe: Recipe
    images: int  # that an epoch shows
    evaluated: int = 0  # images that the trained model classifies, once
    data: str = ""
    strategy: str = "full"
    masked: int = 0  # patches predicted in each image
    targets: str = "none"
    tokenizer: DVAEConfig | None = None
    accumulate: int = 1
    checkpointing: bool = False
    precision: str = "bf16"

    @property
    def seen(self) -> int:
        """Images of the whole training; a repeated view of one counts as one."""
        return self.recipe.epochs * self.images

    @property
    def kind(self) -> str:
        """A row's name."""
        m = self.model
        words = [self.protocol, f"{m.name} at {m.image_size}"]
        if isinstance(m, ViTConfig):
            words += [f"{m.stem}-{m.norm}"] if m.stem != "linear" or m.norm != "none" else []
            words += ["LS"] if m.layer_scale else []
        words += [self.strategy] if self.protocol == "finetune" else []
        words += [f"targets {self.targets}"] if self.protocol == "masked" else []
        words += ["checkpointing"] if self.checkpointing else []
        return ", ".join(
            [*words, self.recipe.optimizer, f"{self.recipe.epochs} epochs", *([self.data] * bool(self.data))]
        )


def job(spec: RunSpec) -> Job:
    """What a run costs, from its spec. Raises UsageError for data whose card a run cannot name."""
    sizes = spec.facts.sizes
    held_out = sizes.get(spec.split, sizes["test"])
    return Job(
        spec.protocol, spec.model, spec.recipe, spec.training_images, 0 if spec.protocol == "masked" else held_out,
        spec.data, spec.strategy, spec.masked, spec.targets, spec.tokenizer and spec.tokenizer.model, spec.accumulate,
        spec.checkpointing, spec.precision,
    )  # fmt: skip


class _Relaxed(nn.Module):
    """A discrete VAE as it trains: soft tokens, so that the product with the codebook is there."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config, self.dvae = config, DVAE(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.dvae.decode(self.dvae.logits(images).softmax(dim=-1) @ self.dvae.codebook)


def on_meta(config: ViTConfig | DVAEConfig) -> nn.Module:
    """The model that a run trains, without its values."""
    with torch.device("meta"):
        return ViT(config) if isinstance(config, ViTConfig) else _Relaxed(config)


def _plain(config: ViTConfig | DVAEConfig) -> ViTConfig | DVAEConfig:
    """Without what changes no multiply-add, so that equal counts are taken once."""
    return replace(config, layer_scale=None, drop_path=0.0) if isinstance(config, ViTConfig) else config


@functools.cache
def _forward(config: ViTConfig | DVAEConfig) -> int:
    return count.macs(config if isinstance(config, ViTConfig) else on_meta(config)).matmul


@functools.cache
def _frozen_step(config: ViTConfig, strategy: str) -> int:
    return sum(step.total for step in count.step_macs(config, strategy).values())


@functools.cache
def _encoder(config: DVAEConfig) -> int:
    encoder = on_meta(config).dvae.encoder
    encoder.config = config  # which tells `macs` the size of an image
    return count.macs(encoder).matmul


def forward_macs(job: Job) -> int:
    """Multiply-adds of one image's forward pass, matrix products and convolutions, every token in every layer.

    Masked pre-training predicts tokens of the masked patches and has no classes.
    """
    if job.protocol != "masked":
        return _forward(_plain(job.model))
    trunk = _forward(_plain(replace(job.model, num_classes=0)))
    return trunk + job.masked * job.model.width * _outputs(job)


def step_macs(job: Job) -> int:
    """Multiply-adds of one image's training step: forward and twice that backward.

    With frozen parts exactly what is left (`count.step_macs`). Activation checkpointing adds a forward pass, masked
    pre-training the tokenizer's.
    """
    forward = forward_macs(job)
    step = 3 * forward if job.strategy == "full" else _frozen_step(_plain(job.model), job.strategy)
    return step + job.checkpointing * forward + _tokenizer_macs(job)


def _tokenizer_macs(job: Job) -> int:
    return _encoder(job.tokenizer) if job.tokenizer else 0


def _outputs(job: Job) -> int:
    """Width of what masked pre-training predicts for a patch."""
    if job.tokenizer:
        return job.tokenizer.vocabulary
    pixels = job.model.in_chans * job.model.patch_size**2
    return pixels if job.targets == "pixels" else VOCABULARY


def flop(job: Job) -> int:
    """Of the whole run: training, and one evaluation of the last weights (with EMA, of both)."""
    evaluations = 1 if job.recipe.ema is None else 2
    return 2 * (job.seen * step_macs(job) + evaluations * job.evaluated * forward_macs(job))


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Held:
    """Bytes that a run holds on a GPU: whatever the batch, and for each image of a part of it."""

    weights: int
    optimizer: int
    ema: int
    gradients: int
    fixed: int  # activations that do not grow with the batch: half-precision copies of the weights
    an_image: int

    @property
    def state(self) -> int:
        return self.weights + self.optimizer + self.ema + self.gradients + self.fixed

    @property
    def checkpoint(self) -> int:
        """What a run that is interrupted goes on from."""
        return self.weights + self.optimizer + self.ema


def held(job: Job) -> Held:
    """By `measure`'s counts: weights, gradients and optimizer in float32, activations under autocast.

    Activations are counted on small models: they are exactly linear in the batch and in the layers. In closed form: the
    logits of masked pre-training (float32, and their inputs in half precision), and activation checkpointing (every
    layer's input, and the inside of one). A tokenizer's are counted in float32. LAMB holds what AdamW does.
    """
    model = _trained(job)
    optimizer = "sgd" if job.recipe.optimizer == "sgd" else "adamw"
    state = count.training_state(model, optimizer)
    fixed, an_image = (_relaxed_activations if isinstance(job.model, DVAEConfig) else _activations)(job)
    if job.protocol == "masked":
        an_image += job.masked * (4 * _outputs(job) + 2 * job.model.width)
    ema = 0 if job.recipe.ema is None else state.weights
    return Held(state.weights, state.optimizer, ema, state.gradients, fixed, an_image)


def _trained(job: Job) -> nn.Module:
    """All parameters of a run, on the meta device, those frozen that its strategy freezes."""
    if job.protocol != "masked":
        model = on_meta(job.model)
        if job.strategy != "full":
            freeze(model, job.strategy)
        return model
    model = on_meta(replace(job.model, num_classes=_outputs(job)))  # the head in the predictor's place
    model.mask_token = nn.Parameter(torch.empty(job.model.width, device="meta"))
    return model


def _activations(job: Job) -> tuple[int, int]:
    """Bytes kept for the backward pass: (whatever the batch, an image)."""
    classes = 1 if job.protocol == "masked" else job.model.num_classes
    config = replace(job.model, num_classes=classes, drop_path=0.0)
    # From two depths and two batches, since one layer and one image alone are special.
    kept = {(d, b): _kept(replace(config, depth=d), job.strategy, b, job.precision) for d in (2, 3) for b in (2, 3)}
    an_image = {d: kept[d, 3] - kept[d, 2] for d in (2, 3)}
    fixed = {d: kept[d, 2] - 2 * an_image[d] for d in (2, 3)}

    def at(depth: int, of: dict[int, int]) -> int:
        return of[2] + (depth - 2) * (of[3] - of[2])

    if job.checkpointing:
        return at(config.depth, fixed), at(1, an_image) + config.depth * count.FLOAT32 * config.tokens * config.width
    return at(config.depth, fixed), at(config.depth, an_image)


@functools.cache
def _kept(config: ViTConfig, strategy: str, batch: int, precision: str) -> int:
    half = "float32" if precision == "float32" else "amp"
    return count.memory(config, strategy, batch=batch, precision=half).activations


def _relaxed_activations(job: Job) -> tuple[int, int]:
    model, c = on_meta(job.model), job.model

    def saved(batch: int) -> int:
        images = torch.empty(batch, c.in_chans, c.image_size, c.image_size, device="meta")
        return count.saved_bytes(model, images, lambda out: (out - images).square().mean())

    return saved(2) - 2 * (saved(3) - saved(2)), saved(3) - saved(2)
