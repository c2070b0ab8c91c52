"""Table 4 and beyond: one parallel model, its branches processed in every way, and timm's model with the same weights.

The grid is {seq, par, fused, timm} x {eager, CUDA graph, compiled} by batch, and a training step (forward,
backward, AdamW). Like is compared with like: the same weights, mode and attention kernel in the same process.
"""

from __future__ import annotations

import copy
import functools
import shutil
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.bench.runner import Case, Reading
from lab.bench.stopwatch import Arm, count, take_turns
from vitlib.model import ViT, ViTConfig, fuse, set_execution, vit_config
from vitlib.model.weights import to_timm

ARMS = ("seq", "par", "fused", "timm")
MODES = ("eager", "graph", "compiled")
GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def cases(profile: str, device: str) -> list[Case]:
    """Sizes by device. The restarts are five where a claim (P7) looks: inference, eager, batch up to 4."""
    chosen = []
    if device == "cuda":
        for name in ("S18x2/16", "B18x2/16"):
            chosen += [_case(name, b, mode, device) for b in GPU_BATCHES for mode in MODES]
            chosen += [_case(name, b, "training", device, 3) for b in (8, 64)]
        return chosen
    chosen += [_case("S18x2/16", b, "eager", device, 5 if b <= 4 else 2) for b in (1, 2, 4, 32)]
    chosen += [_case("B18x2/16", b, "eager", device, 2) for b in (1, 4)]
    chosen += [_case("S18x2/16", b, "training", device, 3 if b == 1 else 1) for b in (1, 32)]
    return [*chosen, *(_case("S18x2/16", 1, mode, device, 1) for mode in ("compiled", "graph"))]


def _case(name: str, batch: int, mode: str, device: str, restarts: int | None = None) -> Case:
    config = vit_config(name, layer_scale=1e-4)
    restarts = restarts or (5 if device == "cuda" and mode == "eager" and batch <= 4 else 3)
    task = {"model": asdict(config), "batch": batch, "mode": mode}
    why = ""
    if mode == "graph" and device != "cuda":
        why = "CUDA graphs need a GPU"
    if mode == "compiled" and device != "cuda" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        why = "torch.compile needs a C++ compiler here"
    part = f"P7-{name[0]}{batch}" if mode == "eager" and batch <= 4 else ""
    return Case(
        f"{config.name} at {config.image_size} px, batch {batch}, {mode}", task, "seq", restarts, why, part=part
    )


def measure(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """Every arm of one case in this process."""
    config = ViTConfig(**task["model"])
    batch, mode = task["batch"], task["mode"]
    shape = (batch, config.in_chans, config.image_size, config.image_size)
    model = ViT(config).eval().to(device)
    models = {name: _arm(model, name) for name in ARMS}
    if mode == "training":
        models.pop("fused")  # for inference only
        arms = {name: _training(m.train(), shape, device, dtype) for name, m in models.items()}
    else:
        arms = {name: _inference(m.to(dtype), mode, shape, device, dtype) for name, m in models.items()}
    return {
        name: Reading(t.seconds, *_counts(config, name, mode, shape)) for name, t in take_turns(arms, device).items()
    }


def _arm(model: ViT, name: str) -> nn.Module:
    if name == "timm":
        return to_timm(model)
    return fuse(model) if name == "fused" else set_execution(copy.deepcopy(model), name)


def _inference(model: nn.Module, mode: str, shape: tuple, device: str, dtype: torch.dtype) -> Arm:
    fresh = functools.partial(torch.randn, shape, device=device, dtype=dtype)
    run = {"eager": lambda: model, "compiled": lambda: torch.compile(model), "graph": lambda: _graph(model, fresh)}[
        mode
    ]()

    @torch.no_grad()
    def step(images: Tensor) -> Tensor:
        return run(images)

    return Arm(fresh, step)


@torch.no_grad()
def _graph(model: nn.Module, fresh):
    """The whole forward pass as one CUDA graph; new images are copied into its input."""
    given, graph = fresh(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up off the main stream, as PyTorch asks
        for _ in range(3):
            model(given)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = model(given)

    def run(images: Tensor) -> Tensor:
        given.copy_(images)
        graph.replay()
        return logits

    return run


def _training(model: nn.Module, shape: tuple, device: str, dtype: torch.dtype) -> Arm:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.arange(shape[0], device=device) % 1000
    half = dtype != torch.float32

    def step(images: Tensor) -> None:
        with torch.autocast(device, dtype, enabled=half):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Arm(functools.partial(torch.randn, shape, device=device), step)


def _counts(config: ViTConfig, name: str, mode: str, shape: tuple) -> tuple[int, int]:
    """Counted on the meta device; a compiled or graphed step counts as the eager one. Without the optimizer."""
    with torch.device("meta"):
        model = _arm(ViT(config), name).train(mode == "training")
        images = torch.empty(shape)

    def step() -> None:
        if mode == "training":
            model(images).square().sum().backward()
        else:
            with torch.no_grad():
                model(images)

    if name == "par" and mode != "training":
        step()  # the wide matrices are made once
    return count(step, on_meta=True)
