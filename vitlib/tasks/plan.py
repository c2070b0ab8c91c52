"""`python -m vitlib plan`: what fine-tuning on these images will take, per strategy, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlib.errors import unknown
from vitlib.tasks.compare import measure, step_bytes
from vitlib.tasks.finetune import prepare
from vitlib.train import loop
from vitlib.train.engine import HERE, resolve


class Device(NamedTuple):
    tflops: float  # dense half precision with sums in float32, as the makers say
    memory_gb: float


DEVICES = {"a100": Device(312, 80), "h100": Device(989, 80), "h200": Device(989, 141), "l4": Device(121, 24),
           "l40s": Device(362, 48), "rtx3090": Device(71, 24), "rtx4090": Device(165, 24), "t4": Device(65, 16),
           "v100": Device(125, 32)}  # fmt: skip
SHARE = 0.3  # of the maker's rate that training reaches: assumed


def plan(
    folder: Path | str, weights: Path | str | None = None, strategies: Sequence[str] = ("full", "attn", "head"), *,
    epochs: int = 10, batch_size: int = 32, image_size: int | None = None, labels: Path | str | None = None,
    group: str | None = None, device: str = "auto",
) -> str:  # fmt: skip
    """A line for each strategy: memory of a step, minutes of one run, and on a named GPU the largest batch.

    Memory is counted in float32; time is measured here, or for a named GPU counted from its multiply-adds. Raises
    UsageError as `finetune`, and for a device that is not known.
    """
    if device not in (*HERE, *DEVICES):
        raise unknown("device", device, (*HERE, *DEVICES))
    here = device if device in HERE else "cpu"
    job = prepare(folder, Path("runs"), weights, strategies, epochs, batch_size, image_size, labels, group, here)
    where = device if device in DEVICES else resolve(device)
    steps, lines = loop.count_steps(job.recipe(1.0), len(job.data["train"])), []
    for strategy in strategies:
        model = job.start(strategy, 0)
        image = torch.zeros(1, model.config.in_chans, job.view.image_size, job.view.image_size)
        one, two = (step_bytes(model, image.repeat(n, 1, 1, 1)) for n in (1, 2))
        each, fixed = two - one, 2 * one - two  # bytes per image, and without images
        if device in DEVICES:
            with FlopCounterMode(display=False) as counter:
                model(image).sum().backward()
            seconds = counter.get_total_flops() * batch_size / (SHARE * 1e12 * DEVICES[device].tflops)
            most = f", at most {max(0, int((1e9 * DEVICES[device].memory_gb - fixed) / each)):,} images at once"
        else:
            seconds, most = measure(job, strategy).step_s, ""
        memory = f"{(fixed + batch_size * each) / 1e9:.2f} GB of memory"
        time = timedelta(seconds=math.ceil(steps * seconds))
        lines.append(f"{strategy}: {time} for a run on {where}, {memory}{most}")
    how = "one step, measured here" if device in HERE else f"{SHARE:.0%} of the maker's rate, assumed"
    about = f"hours:minutes:seconds from {how}; batches of {batch_size}, {epochs} epochs; a search of the rate is 3 runs or more"
    return "\n".join([*lines, about])
