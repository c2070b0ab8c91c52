"""The benchmarks that the paper's claims need: Table 4 (branches at once, P7) and a step of each strategy (F3).

branches  one parallel model by {seq, par, fused, timm with the same weights} x {eager, CUDA graph, compiled} and batch,
          and a training step
finetune  a fine-tuning step by strategy, at the profile's own size and for ViT-B at 384 pixels; its memory is counted

All arms of a case are the same model in one process, with the same mode, precision and attention kernel. A training step
is forward, backward, AdamW.
"""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.bench import runner
from lab.bench.runner import Arm, Bench, Case, Reading, take_turns
from lab.cost import count
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import Profile
from lab.runs.spec import RunSpec
from vitlib.model import ViT, ViTConfig, fuse, set_execution, vit_config
from vitlib.model.weights import to_timm
from vitlib.train.engine import resolve
from vitlib.train.finetune import PAPER_STRATEGIES, freeze
from vitlib.train.loop import set_train_mode

RESTARTS = 5  # of what a claim is judged on
EXECUTIONS = ("seq", "par", "fused", "timm")
BACKENDS = {"graph": "cudagraphs", "compiled": "inductor"}  # torch.compile's; others are "eager" and "training"
GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
F3 = "F3-time"
CPU_BATCH = 2  # images of the paper's own size, whose step takes seconds on a CPU; a case's name says its batch


# ---------------------------------------------------------------------------------------------------- the comparisons


def branches(profile: Profile, device: str) -> list[Case]:
    """Table 4's models, at sizes by device, the same at every profile. P7 looks at inference, eager, of up to 4 images."""
    if device == "cuda":
        sizes = [*itertools.product(GPU_BATCHES, ("eager", *BACKENDS)), (8, "training"), (64, "training")]
        return [_branches(name, *size, 3) for name in ("S18x2/16", "B18x2/16") for size in sizes]
    sizes = [*((batch, "eager") for batch in (1, 2, 4, 32)), (1, "training"), (32, "training")]
    if any(map(shutil.which, ("c++", "g++", "clang++"))):  # torch.compile's
        sizes.append((1, "compiled"))
    large = [_branches("B18x2/16", batch, "eager", 1) for batch in (1, 4)]
    return [_branches("S18x2/16", *size, 1) for size in sizes] + large


def _branches(name: str, batch: int, mode: str, restarts: int) -> Case:
    part = f"P7-{name[0]}{batch}" if mode == "eager" and batch <= 4 else ""
    # `fuse` is for inference only
    arms = {execution: (execution, "") for execution in EXECUTIONS if mode != "training" or execution != "fused"}
    config = vit_config(name, layer_scale=1e-4)
    return _case(config, batch, mode, arms, "seq", RESTARTS if part else restarts, part=part)


def finetune(profile: Profile, device: str) -> list[Case]:
    """The profile's own step, which F3 is judged on, and ViT-B at the paper's resolution.

    A step is of as many images as the profile's runs put through the model at once.
    """
    spec, on_cpu = _full(profile), device == "cpu" and profile.paper

    def case(config: ViTConfig, batch: int, execution: str, **more: object) -> Case:
        arms = {strategy: (execution, strategy) for strategy in PAPER_STRATEGIES}
        return _case(config, batch, "training", arms, "full", RESTARTS, **more)

    at_once = CPU_BATCH if on_cpu else spec.recipe.batch_size // spec.accumulate
    own = case(spec.model, at_once, spec.execution, threads=spec.threads, part=F3, run=spec.hash)
    large = vit_config("B12", image_size=384, layer_scale=1e-4)
    # at the paper's scale without a GPU, the profile's own step is the other one
    return [own] if on_cpu else [own, case(large, 64 if device == "cuda" else CPU_BATCH, "seq")]


def _full(profile: Profile) -> RunSpec:
    return arms_of(small.resolution, profile)["full"].spec


def _case(config: ViTConfig, batch: int, mode: str, arms: dict, reference: str, restarts: int, **more: object) -> Case:
    """`arms`: name -> (execution, strategy)."""
    task = {"model": config, "batch": batch, "mode": mode, "arms": arms}
    title = f"{config.name} at {config.image_size} px, batch {batch}" + (f", {mode}" if reference == "seq" else "")
    return Case(title, "lab.bench.cases:time_arms", task, reference, restarts, **more)


# ---------------------------------------------------------------------------------------------------- in the process


def time_arms(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """Every arm, counted before it is timed; with a strategy the memory of its step too, in MB.

    A compiled or graphed step counts as the eager one.
    """
    config, batch, mode, arms, counts = task["model"], task["batch"], task["mode"], {}, {}
    size, model = (batch, config.in_chans, config.image_size, config.image_size), ViT(config).eval().to(device)
    training = mode == "training"
    fresh = functools.partial(torch.randn, size, device=device, dtype=torch.float32 if training else dtype)
    for name, (execution, strategy) in task["arms"].items():
        arm = arm_of(model, execution, strategy)
        step = training_step(arm, batch, device, dtype) if training else torch.no_grad()(arm.to(dtype).forward)
        macs = count.counted(functools.partial(step, fresh()))
        counts[name] = macs, _megabytes(config, strategy, batch) if strategy else {}
        if mode in BACKENDS:
            step = torch.no_grad()(torch.compile(arm, backend=BACKENDS[mode]))
        arms[name] = Arm(fresh, step)
    seconds = take_turns(arms, device, 2.0 if "full" in arms else runner.SECONDS_PER_ARM)
    return {name: Reading(seconds[name], *counts[name]) for name in arms}


def arm_of(model: ViT, execution: str, strategy: str = "") -> nn.Module:
    """The same function, its branches processed in another way, or another part of it trained; `model` stays as it is."""
    if execution == "timm":
        return to_timm(model)
    if execution == "fused":
        return fuse(model)
    arm = set_execution(copy.deepcopy(model), execution)
    if strategy:
        freeze(arm, strategy)
    return arm


def _megabytes(config: ViTConfig, strategy: str, batch: int) -> dict[str, float]:
    """Of a step of this batch: saved activations; weights, gradients and optimizer state; all."""
    *state, activations, _ = (size / 2**20 for size in count.memory(config, strategy, batch=batch))
    return {"saved_mb": activations, "state_mb": sum(state), "mem_mb": sum(state) + activations}


def training_step(
    model: nn.Module, batch: int, device: str, dtype: torch.dtype, clip: float | None = None
) -> Callable[[Tensor], None]:
    """Forward, backward and AdamW on images (batch, C, H, W), autocast to `dtype`; `clip`: norm of the gradients at most."""
    set_train_mode(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, labels = torch.optim.AdamW(trained, lr=1e-4, fused=True), torch.arange(batch, device=device) % 10

    def step(images: Tensor) -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------------------------- evidence

BENCHES = {bench.name: bench for bench in (Bench("branches", branches), Bench("finetune", finetune))}


def evidence(profile: Profile, part, stamp: str) -> list[dict]:
    """The rows that a part of a claim is judged on: of its case, every arm and restart, under `stamp`; else none.

    `part` has id, device, contrast and n, as in the ledger; `stamp` is its entry's hash. A part of device "cuda" is judged
    on a GPU's rows alone.
    """
    bench, case = _case_of(profile, part.id, "cuda")
    rows = [row for row in runner.read(runner.path_of(bench.name, profile))
            if (row.get("part"), row.get("ledger"), row.get("run", "")) == (part.id, stamp, case.run)
            and part.device in ("any", row["kind"])]  # fmt: skip
    whole = all(sum(row["arm"] == arm for row in rows) == part.n[profile.name] for arm in part.contrast)
    return rows if whole else []


def measured_evidence(profile: Profile, part, stamp: str) -> list[dict]:
    """The same, measured first where it is missing."""
    if not evidence(profile, part, stamp):
        device = resolve(_full(profile).device)
        bench, case = _case_of(profile, part.id, device)
        runner.run(bench, profile, device, only=case.name, stamps={part.id: stamp})
    return evidence(profile, part, stamp)


def _case_of(profile: Profile, part: str, device: str) -> tuple[Bench, Case]:
    cases = ((bench, case) for bench in BENCHES.values() for case in bench.cases(profile, device))
    return next(found for found in cases if found[1].part == part)
