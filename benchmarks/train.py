"""Training speed at the profile's own sizes: by number of branches, against a plain loop, and how cost grows.

branches    a step of 12x1, 6x2, 4x3, 3x4 in one thread, `par` and `seq`, and timm's models with the same weights
throughput  images a second on all cores: ours as `make reproduce` trains (a single-thread process a core) against timm's
            model in a plain PyTorch loop (one process, all cores, a DataLoader, torchvision's transforms)
growth      twice the images, twice and four times the epochs: time should double and fourfold, memory stay
"""

from __future__ import annotations

import functools
import os
import pickle
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import main
from lab.bench.cases import training_step
from lab.bench.runner import Arm, Bench, Case, Reading, take_turns
from lab.cost.count import counted
from lab.data.cards import load_resized
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import Profile
from lab.runs.launch import MEMORY
from lab.runs.processes import cores
from lab.runs.spec import RunSpec
from vitlib.model import ViT, set_execution
from vitlib.model.weights import to_timm
from vitlib.train import loop
from vitlib.train.supervised import cross_entropy

WINDOW = 24  # steps of all processes together that are timed at a time
GROWTH_IMAGES = 960


def cases(profile: Profile, device: str) -> list[Case]:
    if device == "cuda":
        return []
    spec = arms_of(small.resolution, profile)["trunk"].spec
    size = f"{spec.model.image_size} px, width {spec.model.width}, {spec.model.pairs} pairs, batch {spec.recipe.batch_size}"

    def case(what: str, name: str, spec: RunSpec, reference: str, threads: int) -> Case:
        return Case(f"{name}, {size}", f"benchmarks.train:{what}", {"spec": spec}, reference, 3, threads=threads)

    return [
        case("branches", "branches", spec, "12x1 seq", 1),
        *(case("throughput", f"throughput of {name}", regrouped(spec, name), "timm plain loop", 0) for name in ("12x1", "6x2")),
        case("growth", "growth", spec, "1 epoch", 1),
    ]  # fmt: skip


def regrouped(spec: RunSpec, name: str) -> RunSpec:
    """The run with its pairs in another depth and number of branches, such as "6x2"."""
    depth, branches = map(int, name.split("x"))
    return replace(spec, model=replace(spec.model, depth=depth, branches=branches))


# ---------------------------------------------------------------------------------------------------- branches


def branches(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """A training step of each grouping, in every way that trains it."""
    spec = task["spec"]
    c, batch = spec.model, spec.recipe.batch_size
    models: dict[str, nn.Module] = {}
    for name in ("12x1", "6x2", "4x3", "3x4"):
        config = regrouped(spec, name).model
        models[f"{name} seq"] = set_execution(ViT(config), "seq")
        if config.branches > 1:
            models[f"{name} par"] = set_execution(ViT(config), "par")
        models[f"{name} timm"] = to_timm(ViT(config))
    fresh = functools.partial(torch.randn, batch, c.in_chans, c.image_size, c.image_size)
    steps = {name: training_step(m, batch, device, dtype, spec.recipe.clip) for name, m in models.items()}
    arms = {name: Arm(fresh, step) for name, step in steps.items()}
    seconds = take_turns(arms)
    return {name: Reading(seconds[name], counted(lambda arm=arms[name]: arm.step(arm.fresh()))) for name in arms}


# ---------------------------------------------------------------------------------------------------- throughput


def throughput(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """Seconds for WINDOW steps together, whoever does them."""
    spec, workers = task["spec"], cores()
    mine = WINDOW // workers
    plain = {name: value for name, value in os.environ.items() if name not in MEMORY}
    with ExitStack() as stack:

        def start(count: int, environment: dict[str, str], loop: str, steps: int, loaders: int = 0) -> list[Worker]:
            work = {"spec": spec, "loop": loop, "steps": steps, "loaders": loaders}
            return [stack.enter_context(Worker(work, environment)) for _ in range(count)]

        arms = {"ours": _window(start(workers, plain | MEMORY, "ours", mine))}
        for processes, name in ((0, "timm plain loop"), (workers, f"timm plain loop, {workers} loader processes")):
            arms[name] = _window(start(1, plain, "plain", WINDOW, processes))
        taken = take_turns(arms, seconds=10.0)
    images = WINDOW * spec.recipe.batch_size
    return {
        name: Reading(seconds, 0, {"images_per_s": round(images / statistics.median(seconds), 1)})
        for name, seconds in taken.items()
    }


def _window(workers: list[Worker]) -> Arm:
    def step(_: object) -> None:
        for worker in workers:
            worker.go()
        for worker in workers:
            worker.done()

    return Arm(lambda: None, step)


class Worker:
    """A training process that does one window of steps at each `go`, and sleeps between."""

    def __init__(self, work: dict, environment: dict[str, str]):
        code = "import pickle, sys; from benchmarks.train import work; work(pickle.loads(bytes.fromhex(sys.argv[1])))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, pickle.dumps(work).hex()], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def done(self) -> None:
        if self.process.stdout.readline() != "done\n":
            raise RuntimeError("a training process of the throughput benchmark ended early")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _wait_for_go() -> None:
    if not sys.stdin.readline():
        sys.exit()


def work(order: dict) -> None:
    """In a worker: train for ever, a window at a time."""
    spec = order["spec"]
    data = load_resized(spec.data, "train", spec.model.image_size)
    if order["loop"] == "plain":
        _plain_loop(spec, data, order)
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipe = replace(spec.recipe, epochs=10_000)

    def on_step(step: int, steps: int) -> None:
        if step % order["steps"] == 0:
            print("done", flush=True)
            _wait_for_go()

    _wait_for_go()
    model = set_execution(ViT(spec.model), spec.execution)
    loop.train(model, recipe, data, np.arange(len(data)), 0, cross_entropy, on_step)


def _plain_loop(spec: RunSpec, data, order: dict) -> None:
    """What most people would write: timm's model, a map-style data set, torchvision's transforms, a DataLoader."""
    from torchvision.transforms import v2

    transform = v2.Compose([
        v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(data.mean.flatten().tolist(), data.std.flatten().tolist()),
    ])  # fmt: skip

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, i: int):
            return transform(data.images[i]), data.labels[i]

    loader = torch.utils.data.DataLoader(
        Images(), spec.recipe.batch_size, shuffle=True, num_workers=order["loaders"],
        persistent_workers=order["loaders"] > 0,
    )  # fmt: skip
    model = to_timm(ViT(spec.model)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
    steps = 0
    _wait_for_go()
    while True:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            steps += 1
            if steps % order["steps"] == 0:
                print("done", flush=True)
                _wait_for_go()


# ---------------------------------------------------------------------------------------------------- growth


def growth(task: dict, device: str, dtype: torch.dtype) -> dict[str, Reading]:
    """Whole trainings of a few steps; memory is what the process holds right after each."""
    spec = task["spec"]
    data = load_resized(spec.data, "train", spec.model.image_size)
    sizes = {"1 epoch": (1, 1), "twice the images": (2, 1), "2 epochs": (1, 2), "4 epochs": (1, 4)}
    held: dict[str, list[float]] = {name: [] for name in sizes}

    def arm(name: str) -> Arm:
        images, epochs = sizes[name]

        def step(model: ViT) -> None:
            recipe = replace(spec.recipe, epochs=epochs)
            loop.train(model, recipe, data, np.arange(images * GROWTH_IMAGES), 0, cross_entropy)
            held[name].append(_resident_mb())

        return Arm(lambda: ViT(spec.model), step)

    taken = take_turns({name: arm(name) for name in sizes})
    return {name: Reading(seconds, 0, {"mem_mb": round(max(held[name][2:]))}) for name, seconds in taken.items()}


def _resident_mb() -> float:
    """Memory that this process holds now; its highest so far where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main(Bench("train", cases), __doc__)
