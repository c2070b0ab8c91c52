"""Figure 4 and F3: a fine-tuning step by strategy, at the profile's own size and for ViT-B at 384 pixels.

Time is measured and belongs to the device it names. Memory is counted, the same on every machine: weights, gradients,
AdamW's state, and the activations that autograd keeps.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.bench import runner
from lab.bench.runner import Case, Reading
from lab.bench.stopwatch import Arm, count, take_turns
from lab.claims.ledger import ledger
from lab.cost import count as counting
from lab.experiments.catalogue import experiment
from lab.experiments.recipes import FINE_TUNING
from vitlib.model import ViT, ViTConfig, set_execution, vit_config
from vitlib.train.engine import resolve
from vitlib.train.finetune import STRATEGIES, freeze
from vitlib.train.loop import make_optimizer, set_train_mode

RESTARTS = 5  # claims.md: the restart is the unit
SECONDS_AN_ARM = 2.0  # in a restart
PART = "F3-time"
CPU_BATCH = 2  # images of the paper's own size, whose step takes seconds on a CPU; a case's name says its batch


def cases(profile: str, device: str) -> list[Case]:
    """The profile's own step, which F3 is judged on, and ViT-B at the paper's resolution; on a GPU its peak memory too.

    A step is of as many images as the profile's runs put through the model at once.
    """
    setting = experiment("41", profile)
    spec = setting.arms["full"]
    large = vit_config("B12", image_size=384, layer_scale=1e-4)
    on_cpu = device == "cpu" and setting.profile.paper
    at_once = CPU_BATCH if on_cpu else spec.recipe.batch_size // spec.accumulate
    every = [_case(spec.model, at_once, spec.execution, spec.threads, spec.hash, PART)]
    if not on_cpu:  # else the profile's own step is this one
        every.append(_case(large, 64 if device == "cuda" else CPU_BATCH, "seq", 0, "", ""))
    if device == "cuda":  # a process for each, so that no other strategy's tensors count
        own = every[-1]
        every += [
            replace(own, name=f"{own.name}, {s} alone", task=own.task | {"only": s}, reference=s, restarts=1)
            for s in STRATEGIES
        ]
    return every


def _case(config: ViTConfig, batch: int, execution: str, threads: int, run: str, part: str) -> Case:
    task = {"model": asdict(config), "batch": batch, "execution": execution, "run": run}
    name = f"{config.name} at {config.image_size} px, batch {batch}"
    return Case(name, task, "full", RESTARTS, threads=threads, part=part)


def measure(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """A step of each strategy: forward, backward, AdamW."""
    config, batch = ViTConfig(**task["model"]), task["batch"]
    shape = (batch, config.in_chans, config.image_size, config.image_size)
    labels = torch.arange(batch, device=device) % config.num_classes
    arms = {}
    for strategy in [task["only"]] if "only" in task else STRATEGIES:
        model = set_execution(ViT(config).to(device), task["execution"])
        freeze(model, strategy)
        set_train_mode(model)
        optimizer, _ = make_optimizer(model, FINE_TUNING[strategy], 100)

        def step(images: Tensor, model=model, optimizer=optimizer) -> None:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        arms[strategy] = Arm(functools.partial(torch.randn, shape, device=device), step)
    timings, about = take_turns(arms, device, SECONDS_AN_ARM), {"run": task["run"]}
    if "only" in task:
        arm = arms[task["only"]]
        about["peak_mb"] = (counting.peak_bytes(lambda: arm.step(arm.fresh()), device) or 0) / 2**20
    return {
        name: Reading(
            timing.seconds, *_counts(config, name, task["execution"], shape), _memory(config, name, batch) | about
        )
        for name, timing in timings.items()
    }


def _counts(config: ViTConfig, strategy: str, execution: str, shape: tuple) -> tuple[int, int]:
    """Forward and backward, without the optimizer."""
    with torch.device("meta"):
        model, images = set_execution(ViT(config), execution).train(), torch.empty(shape)
    freeze(model, strategy)
    return count(lambda: model(images).square().sum().backward(), on_meta=True)


def _memory(config: ViTConfig, strategy: str, batch: int) -> dict[str, float]:
    """MB of a step of this batch: saved activations; weights, gradients and optimizer state; all."""
    held = counting.memory(config, strategy, batch=batch)
    state = held.total - held.activations
    return {"saved_mb": held.activations / 2**20, "state_mb": state / 2**20, "mem_mb": held.total / 2**20}


# ---------------------------------------------------------------------------------------------------- F3


def stored(profile: str) -> list[dict]:
    """The rows that F3 is judged on: of the profile's own run and the present ledger entry; empty where there are none."""
    run = cases(profile, "cpu")[0].task["run"]
    return [row for row in runner.evidence("finetune", profile, ledger()[PART]) if row["run"] == run]


def at_profile(profile: str) -> list[dict]:
    """The same, measured first where it is missing."""
    if not stored(profile):
        device = resolve(experiment("41", profile).arms["full"].device)
        runner.run("finetune", profile, device, only=cases(profile, device)[0].name)
    return stored(profile)
