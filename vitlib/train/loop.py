"""One flat training loop for every protocol, in the order things happen. Callers pass a loss function."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitlib import draws
from vitlib.data import Batch, DataSet
from vitlib.errors import UsageError
from vitlib.train.checkpoint import Checkpoints, Step
from vitlib.train.engine import CPU, BatchNorm, Engine, trains
from vitlib.train.protocol import LossFunction
from vitlib.train.recipe import Recipe


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; the message says at which step."""


def train(
    model: nn.Module, recipe: Recipe, data: DataSet, rows: np.ndarray, seed: int, loss_function: LossFunction,
    on_step: Callable[[int, int], None] = lambda step, steps: None, engine: Engine = CPU, ema: ModelEmaV3 | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[Step]:  # fmt: skip
    """Train `model` in place on the images `rows` of `data`; returns the history, one entry per step.

    Bit for bit the same on one machine's CPU and one thread for the same seed, also when it resumes from a checkpoint.
    `ema`, the moving average, follows every step. `on_step(step, steps)` is called after every step. Raises
    NonFiniteLoss at the first loss that is not finite.
    """
    # model, optimizer, schedule
    steps = count_steps(recipe, len(rows))
    model = engine.place(model, recipe.batch_size)
    optimizer, schedule = make_optimizer(model, recipe, steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    # go on from the last checkpoint, the same one in all processes
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if ema is not None:
        state["ema"] = ema.to(engine.device)
    history = checkpoints.read(state) if checkpoints else []
    if len(set(engine.gather(len(history)))) > 1:
        raise UsageError("the processes of this run read different checkpoints: all must see the same folder")
    loss_of = engine.loss_of(model, loss_function)
    set_train_mode(model)
    parts = engine.parts(model)
    for epoch in range(recipe.epochs * len(history) // steps, recipe.epochs):
        # batches of this epoch that the checkpoint has seen are skipped, not computed
        done = len(history) - epoch * (steps // recipe.epochs)
        for batch in data.epoch_batches(rows, seed, epoch, recipe, engine.shard, skip=done):
            # the learning rate of this step
            schedule.step_update(len(history))
            # forward and backward, part by part; weighted by their numbers of images the parts' losses add up to the batch's mean
            optimizer.zero_grad()
            total = torch.zeros((), device=engine.device)
            for part in engine.move(batch).parts(parts):  # images (B, C, H, W)
                with engine.forward(loss_of, part.last):
                    loss = loss_of(part, drop_path_draws(model, seed, part)) * part.weight
                loss.backward()
                total = total + loss.detach()
            # stop at a loss that is not finite, before it reaches the weights
            if not math.isfinite(value := engine.mean(total)):
                where = f"step {len(history) + 1} of {steps} (epoch {epoch + 1}, seed {seed})"
                raise NonFiniteLoss(f"the loss is {value} at {where}" + (f"; {checkpoints}" if checkpoints else ""))
            # clip the gradient norm
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(trained, recipe.clip)
            # update the weights and their moving average
            optimizer.step()
            if ema is not None:
                ema.update(model)
            # note the recipe's rate: layer decay scales it by parameter group
            group = optimizer.param_groups[0]
            history.append(Step(len(history) + 1, epoch, group["lr"] / group.get("lr_scale", 1.0), value))
            # write a checkpoint where one is due
            if checkpoints is not None and checkpoints.due():
                checkpoints.write(state, history)
            on_step(len(history), steps)
    return history


def count_steps(recipe: Recipe, images: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be smaller."""
    return recipe.epochs * math.ceil(images / recipe.batch_size)


def make_optimizer(model: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """timm's optimizer over the trainable parameters, and timm's cosine after a linear warm-up, by steps.

    Weight decay spares one-dimensional parameters and what the model names in `no_weight_decay`.
    """
    options = {
        "adamw": {"betas": recipe.betas, "fused": True},
        "lamb": {"betas": recipe.betas},  # clips the gradient norm to 1 by itself
        "sgd": {"momentum": 0.9},  # Nesterov
    }
    optimizer = create_optimizer_v2(
        model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=layer_decay(model, recipe),
        **options[recipe.optimizer],
    )  # fmt: skip
    warmup = round(recipe.warmup * steps)
    schedule = CosineLRScheduler(
        optimizer, t_initial=max(steps - warmup, 1), lr_min=recipe.min_lr, warmup_t=warmup,
        warmup_lr_init=recipe.lr / (warmup + 1), warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    return optimizer, schedule


def layer_decay(model: nn.Module, recipe: Recipe) -> float | None:
    """timm's factor from layer to layer for this model; None where the recipe has none.

    A 12-layer model takes the recipe's, so that its stem learns at factor^13 of the head's rate. The same factor would
    give the stems of 12x1, its twin 6x2 and B13 different rates (at 0.65: 0.0037, 0.049, 0.0024), and a comparison of
    them would compare rates too. Every depth therefore takes the factor whose product down to the stem is the same.
    Raises UsageError for a model that does not say what its layers are.
    """
    if recipe.layer_decay is None:
        return None
    if not hasattr(model, "group_matcher") or not hasattr(model, "layers"):
        raise UsageError(f"layer decay is for classifiers: a {type(model).__name__} has no layers to tell apart")
    return recipe.layer_decay ** (13 / (len(model.layers) + 1))


def set_train_mode(model: nn.Module) -> None:
    """Training mode, except for frozen batch norms: their statistics stay those of the parent model."""
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm) and not trains(module):
            module.eval()


def drop_path_draws(model: nn.Module, seed: int, batch: Batch) -> Tensor | None:
    """One draw for each pair, each of its two functions and each image: (pairs, 2, B); None where drop-path is off."""
    config = model.config
    if config.drop_path == 0:
        return None
    u = draws.uniform(seed, "drop-path", batch.epoch, batch.index, 2 * config.pairs)  # (B, 2 pairs)
    draw = torch.from_numpy(u.T.reshape(config.pairs, 2, len(batch.index)).astype(np.float32))
    return draw.to(batch.images.device, non_blocking=True)
