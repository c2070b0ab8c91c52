"""What data and augmentation cost: the time to make a batch as a share of the training step that it feeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import main
from lab.bench.runner import Arm, Bench, Case, Reading, take_turns
from lab.cost.count import counted
from lab.data.cards import load_resized
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import Profile
from lab.runs.spec import RunSpec
from vitlib.data import Batch, DataSet, subset
from vitlib.model import ViT, set_execution
from vitlib.train import finetune, loop, masked, tokenizers
from vitlib.train.supervised import loss_of


def cases(profile: Profile, device: str) -> list[Case]:
    """One case for each kind of run that the profile has."""
    if device == "cuda":
        return []
    return [
        Case(f"{kind}, {spec.model.name} at {spec.model.image_size} px, batch {spec.recipe.batch_size}",
             "benchmarks.data:measure", {"spec": spec}, "batch", 3, threads=spec.threads)
        for kind, spec in kinds(profile).items()
    ]  # fmt: skip


def kinds(profile: Profile) -> dict[str, RunSpec]:
    """A run of each kind that the profile's notebooks have."""
    stems, resolution = (
        {label: arm.spec for label, arm in arms_of(table, profile).items()} for table in (small.stems, small.resolution)
    )
    light = replace(stems["hmlp pretrained"].parent, targets="tokens", tokenizer=None)  # no run to train first
    return {
        "supervised": resolution["trunk"], "fine-tuning": resolution["attn"],
        "masked": light, "stem": stems["hmlp supervised"],
    }  # fmt: skip


def measure(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """`batch`: order, flip, normalisation, masks and targets. `step`: the model, its gradients, the optimizer."""
    spec = task["spec"]
    data = load_resized(spec.data, "train", spec.model.image_size)
    batches = _endless(spec, data)
    if spec.protocol == "masked":
        targets = tokenizers.make_targets(spec.targets, data, spec.model.patch_size, spec.seed)
        model, drawn = masked.MaskedViT(spec.model, targets.outputs), masked.MaskedLoss(targets, 0, spec.masked)
        set_execution(model.vit, spec.execution)
    else:
        model, drawn = set_execution(ViT(spec.model), spec.execution), None
        finetune.freeze(model, spec.strategy)
    loop.set_train_mode(model)
    optimizer, _ = loop.make_optimizer(model, spec.recipe, 1000)
    trained = [p for p in model.parameters() if p.requires_grad]

    def make(_: object) -> tuple:
        batch = next(batches)
        if drawn is None:
            return batch, None, None
        mask = drawn.mask(spec.model.grid, batch)
        return batch, mask, drawn.targets(batch)[mask]

    def step(given: tuple) -> None:
        batch, mask, target = given
        if drawn is None:
            loss = loss_of(spec.recipe)(model, batch, None)
        else:
            loss = drawn.targets.loss(model(batch.images, mask), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.recipe.clip)
        optimizer.step()

    arms = {"batch": Arm(lambda: None, make), "step": Arm(lambda: make(None), step)}
    return {
        name: Reading(seconds, counted(lambda arm=arms[name]: arm.step(arm.fresh())))
        for name, seconds in take_turns(arms, device).items()
    }


def _endless(spec: RunSpec, data: DataSet) -> Iterator[Batch]:
    rows = subset(data, spec.images, spec.seed)
    for epoch in itertools.count():
        yield from data.epoch_batches(rows, 0, epoch, spec.recipe)


if __name__ == "__main__":
    main(Bench("data", cases), __doc__)
