"""`python -m vitlib compare`: is tuning attention alone enough on these images?

Every strategy gets a learning rate of its own, searched on the validation part with a seed that is not compared. Then all
strategies train with the same seeds: the same split, fresh head and order of images. Differences of test accuracy have an
interval over seeds and test images, both random. What was trained is kept, so that more seeds cost only themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vitlib.errors import UsageError, need
from vitlib.files import intact, write_figure, write_table, write_whole
from vitlib.model import ViT
from vitlib.stats import Estimate, difference, interval
from vitlib.tasks.finetune import prepare
from vitlib.tasks.runs import Job, Run, alone, best_of, check_place, computing, execute, say, search
from vitlib.tasks.trunk import read_trunk
from vitlib.train import loop, supervised

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING_SEED = 1000
MOST_SEEDS = 200  # what "needs about n more seeds" looks at
ALONE = {"attn": "attention", "ffn": "the feed-forward networks", "head": "the head", "norm": "the norms",
         "bias": "biases", "fc1": "the first FFN matrices", "full": "everything", "lora": "LoRA on attention"}  # fmt: skip
COLUMNS = ("strategy", "lr", "top1", "sd", "difference", "low", "high", "time_s", "memory_mb", "stored_mb")


@dataclass(frozen=True)
class Cost:
    """Of one training step of a strategy, and of storing what it changed."""

    step_s: float
    memory_mb: float  # weights, gradients, AdamW's state, activations: counted on CPU, the allocator's peak on a GPU
    stored_mb: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Of strategies on one task: test images classified correctly, bool (seeds, images), by strategy."""

    correct: dict[str, np.ndarray]
    rates: dict[str, float]
    seconds: dict[str, float]  # of a run
    costs: dict[str, Cost]
    margin: float

    @property
    def reference(self) -> str:
        return "full" if "full" in self.correct else next(iter(self.correct))

    def estimate(self, strategy: str) -> Estimate | None:
        """Its difference from the reference; None for one seed, which has no interval."""
        if len(self.correct[strategy]) < 2 or strategy == self.reference:
            return None
        return interval(difference(self.correct, {strategy: 1, self.reference: -1}))

    def verdict(self, strategy: str) -> str:
        """One sentence."""
        estimate, m = self.estimate(strategy), f"{self.margin:g} point{'s' if self.margin != 1 else ''}"
        what = f"{ALONE.get(strategy, strategy)} alone"
        against = "" if self.reference == "full" else f" than {self.reference}"
        if estimate is None:
            return f"{what}: one seed gives no interval, so nothing is said: give --seeds 2 or more"
        if not_worse(estimate, self.margin):
            return f"{what} is not worse{against} by {m}"
        if estimate.high < 0:
            return f"{what} is worse{against} by {-estimate.high:.1f} to {-estimate.low:.1f} points"
        more = more_seeds(estimate, self.margin)
        needs = f"needs about {more} more seeds" if more else "more seeds do not decide, more test images may"
        return f"{what}: undecided at {m}, {needs}"

    def rows(self) -> list[Sequence[str]]:
        """COLUMNS, and a row for each strategy."""
        rows: list[Sequence[str]] = [COLUMNS]
        for strategy, correct in self.correct.items():
            top1, e, cost = 100 * correct.mean(axis=1), self.estimate(strategy), self.costs[strategy]
            sd = f"{top1.std(ddof=1):.1f}" if len(top1) > 1 else "-"
            gap = [f"{points:+.1f}" for points in (e.mean, e.low, e.high)] if e else ["-", "-", "-"]
            took = (f"{self.seconds[strategy]:.0f}", f"{cost.memory_mb:.0f}", f"{cost.stored_mb:.2f}")
            rows.append([strategy, f"{self.rates[strategy]:g}", f"{top1.mean():.1f}", sd, *gap, *took])
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(n) for cell, n in zip(row, wide, strict=True)) for row in rows]
        seeds, images = next(iter(self.correct.values())).shape
        about = f"{seeds} seeds, {images} test images; differences from {self.reference} in points, 95 %"
        return "\n".join([*table, about, *(self.verdict(s) for s in self.correct if s != self.reference)])

    def figure(self) -> Figure:
        """Accuracy per seed, and differences with intervals and the margin."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.2 + 0.45 * len(self.correct)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for k, (strategy, correct) in enumerate(self.correct.items()):
            top1 = 100 * correct.mean(axis=1)
            left.plot(top1, [k] * len(top1), "o", alpha=0.5)
            left.plot(top1.mean(), k, "k|", markersize=14)
            if e := self.estimate(strategy):
                right.errorbar(e.mean, k, xerr=[[e.mean - e.low], [e.high - e.mean]], fmt="ko", capsize=3)
        right.axvspan(-self.margin, 0, alpha=0.15)
        right.axvline(0, color="black", linewidth=0.8)
        left.set(xlabel="top-1 on test images (%), each seed", yticks=range(len(self.correct)))
        left.set_yticklabels(self.correct)
        left.margins(y=0.2)
        left.invert_yaxis()
        right.set(xlabel=f"difference from {self.reference} (points, 95 %)")
        return figure


@alone
def compare(
    folder: Path | str, out: Path | str, weights: Path | str | None = None,
    strategies: Sequence[str] = ("full", "attn", "ffn", "norm", "bias", "head"), seeds: int = 5, margin: float = 1.0, *,
    epochs: int = 10, batch_size: int = 32, image_size: int | None = None, labels: Path | str | None = None,
    group: str | None = None, device: str = "auto",
) -> Comparison:  # fmt: skip
    """Fine-tune by several strategies and say which are not worse than `full` (or the first) by `margin` points.

    Strategies are those of `finetune`, and `lora`. `out` gets compare.csv, compare.png, the split and the finished runs,
    which are read when asked for again. Raises UsageError as `finetune`, and for fewer than two strategies, no seed, and a
    margin that is not above 0.
    """
    out, strategies = Path(out), list(dict.fromkeys(map(str, strategies)))
    numbers = type(seeds) is int and type(margin) in (int, float)
    if len(strategies) < 2 or not numbers or seeds < 1 or not 0 < margin < math.inf:
        given = f"{len(strategies)} strategies, {seeds!r} seeds and margin {margin!r}"
        raise UsageError(f"{given} cannot be compared: allowed are 2 strategies, 1 seed, a margin above 0, and more")
    need("scipy", "own")
    need("matplotlib", "own")
    if "lora" in strategies:
        need("peft", "lora")
    check_place(out, ("runs", "split.csv", "compare.csv", "compare.png"))
    plain = [strategy for strategy in strategies if strategy != "lora"]
    job = prepare(folder, out / "runs", weights, plain, epochs, batch_size, image_size, labels, group, device)
    costs = {strategy: measure(job, strategy) for strategy in strategies}
    steps = loop.count_steps(job.recipe(1.0), len(job.data["train"]))
    minutes = (3 + seeds) * steps * sum(cost.step_s for cost in costs.values()) / 60
    each = f"3 rates and {seeds} seeds for each of {len(strategies)} strategies"
    say(f"cost: about {minutes:.1f} minutes or more: {each}")
    job.task.write_split(out / "split.csv")
    rates = {}
    for strategy in strategies:
        tried = search(job, strategy, TUNING_SEED)
        rates[strategy] = best_of(tried)
        for lr in tried:
            forget(Run(strategy, lr, TUNING_SEED).place(job))
    correct, seconds = {s: [] for s in strategies}, {s: [] for s in strategies}
    for seed in range(seeds):
        for strategy, lr in rates.items():
            run = Run(strategy, lr, seed)
            correct[strategy].append(right_on_test(run, job))
            seconds[strategy].append(execute(run, job).seconds)
            say(f"  {run}: {100 * correct[strategy][-1].mean():.1f} % of the test images")
    mean_s = {strategy: float(np.mean(values)) for strategy, values in seconds.items()}
    result = Comparison({s: np.array(values) for s, values in correct.items()}, rates, mean_s, costs, margin)
    write_table(out / "compare.csv", result.rows())
    write_figure(out / "compare.png", result.figure(), dpi=120)
    return result


def forget(place: Path) -> None:
    """Remove the weights of a finished run: its numbers are all that a comparison needs."""
    for kept in place.glob("*.safetensors"):
        kept.unlink()


def right_on_test(run: Run, job: Job) -> np.ndarray:
    """Which test images a run's best model classifies correctly, bool (N,)."""
    place = run.place(job) / "test.npy"
    if not place.is_file():
        if execute(run, job).top1 < 0:
            raise UsageError(
                f"the loss of {run} is not finite at a rate that another seed chose: leave {run.strategy} out"
            )
        model = read_trunk(place.parent / "best.safetensors").model.to(job.engine.device)
        _, correct = supervised.evaluate(model, job.data["test"], job.engine)
        with write_whole(place) as draft:
            np.save(draft, correct)
        forget(place.parent)
    with intact(place):
        correct = np.load(place)  # arrays alone: no pickled code is run
        if (correct.dtype, correct.shape) != (bool, (len(job.data["test"]),)):
            raise ValueError
    return correct


def measure(job: Job, strategy: str) -> Cost:
    """Train two steps: the time of the second one."""
    model, train, on_gpu = job.start(strategy, 0), job.data["train"], job.engine.device == "cuda"
    rows, recipe = np.arange(min(2 * job.batch_size, len(train))), replace(job.recipe(1e-6), epochs=1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [time.perf_counter()]
    with computing(model.config, job.batch_size):
        inputs = (model, recipe, train, rows, 0, supervised.loss_of(recipe))
        loop.train(*inputs, on_step=lambda *_: times.append(time.perf_counter()), engine=job.engine)
    batch = next(train.epoch_batches(rows, 0, 0, recipe))
    memory = torch.cuda.max_memory_allocated() if on_gpu else step_bytes(model, batch.images)
    stored = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(times[-1] - times[-2], memory / 1e6, 4 * stored / 1e6)


def step_bytes(model: ViT, images: torch.Tensor) -> int:
    """Bytes of one float32 step: weights; gradients and AdamW's two moments of what trains; what the backward pass keeps."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).sum()  # alive until all is counted
    state = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    return state + sum(kept.values()) + 0 * loss.numel()


def not_worse(estimate: Estimate, margin: float) -> bool:
    """One-sided at 5 %: the 90 % interval lies above -margin."""
    return estimate.bounds(0.90)[0] > -margin


def more_seeds(estimate: Estimate, margin: float) -> int | None:
    """How many more seeds would decide if mean and variances stay; None where MOST_SEEDS do not."""
    for n in range(estimate.n + 1, MOST_SEEDS + 1):
        later = estimate.with_seeds(n)
        if not_worse(later, margin) or later.high < 0:
            return n - estimate.n
    return None
