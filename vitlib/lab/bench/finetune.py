"""Figure 4 and F3: a fine-tuning step by strategy, at the profile's own size and for ViT-B at 384 pixels.

Time is measured and belongs to the device it names. Memory is counted, the same on every machine: weights, gradients,
AdamW's state, and the activations that autograd keeps.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib import paths
from vitlib.lab import measure as counting
from vitlib.lab.bench import runner
from vitlib.lab.bench.runner import Case, Reading
from vitlib.lab.bench.stopwatch import Arm, count, take_turns
from vitlib.lab.experiments import experiment
from vitlib.lab.ledger import ledger_hashes
from vitlib.model import ViT, ViTConfig, set_execution, vit_config
from vitlib.train.finetune import STRATEGIES, freeze
from vitlib.train.loop import make_optimizer, set_train_mode
from vitlib.train.recipes import FINE_TUNING

RESTARTS = 5  # claims.md: the restart is the unit
PART = "F3-time"


def cases(profile: str, device: str) -> list[Case]:
    """The profile's own step, which F3 is judged on, and ViT-B at the paper's resolution."""
    spec = experiment("41", profile).arms["full"]
    large = vit_config("B12", image_size=384, layer_scale=1e-4)
    return [
        _case(spec.model, spec.recipe.batch_size, spec.execution, spec.threads, spec.hash),
        _case(large, 64 if device == "cuda" else 2, "seq", 0, ""),
    ]


def _case(config: ViTConfig, batch: int, execution: str, threads: int, run: str) -> Case:
    task = {"model": asdict(config), "batch": batch, "execution": execution, "run": run}
    name = f"{config.name} at {config.image_size} px, batch {batch}"
    return Case(name, task, "full", RESTARTS, threads=threads)


def measure(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """A step of each strategy: forward, backward, AdamW."""
    config, batch = ViTConfig(**task["model"]), task["batch"]
    shape = (batch, config.in_chans, config.image_size, config.image_size)
    labels = torch.arange(batch, device=device) % config.num_classes
    arms = {}
    for strategy in STRATEGIES:
        model = set_execution(ViT(config).to(device), task["execution"])
        freeze(model, strategy)
        set_train_mode(model)
        optimizer, _ = make_optimizer(model, FINE_TUNING, 100)

        def step(images: Tensor, model=model, optimizer=optimizer) -> None:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        arms[strategy] = Arm(functools.partial(torch.randn, shape, device=device), step)
    about = {"run": task["run"], f"ledger_{PART}": ledger_hashes()[PART]}
    return {
        name: Reading(
            timing.seconds, *_counts(config, name, task["execution"], shape), _memory(config, name, batch) | about
        )
        for name, timing in take_turns(arms, device).items()
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
    """The rows of the profile's own case under the present ledger and run; empty where there are none."""
    own, entry = cases(profile, "cpu")[0], ledger_hashes()[PART]
    rows = runner.read(paths.outputs() / profile / "bench" / "finetune.csv")
    rows = [
        row for row in rows if (row["case"], row["run"], row[f"ledger_{PART}"]) == (own.name, own.task["run"], entry)
    ]
    return rows if len(rows) == RESTARTS * len(STRATEGIES) else []


def at_profile(profile: str) -> list[dict]:
    """The same, measured first where it is missing."""
    if not stored(profile):
        runner.run("finetune", profile, "cpu", only=cases(profile, "cpu")[0].name)
    return stored(profile)
