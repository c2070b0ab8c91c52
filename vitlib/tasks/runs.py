"""One fine-tuning run on a task: trained by `vitlib.train.loop`, watched on the validation part, kept in a folder.

A run's folder has `best.safetensors` and `last.safetensors` (by accuracy on the validation part, then by its loss) and,
when it is finished, `result.json`. Its name is a hash of all that it depends on: asking for a finished run reads it, and a
run that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from vitlib.data import DataSet
from vitlib.errors import UsageError
from vitlib.files import intact, write_whole
from vitlib.model import ViT, ViTConfig
from vitlib.model.weights import save
from vitlib.records import check, whole
from vitlib.tasks.images import PARTS, Task, View
from vitlib.tasks.lora import add_adapters, merged
from vitlib.tasks.trunk import Trunk, write_notes
from vitlib.train import loop, supervised
from vitlib.train.checkpoint import Checkpoints
from vitlib.train.engine import Engine, resolve
from vitlib.train.finetune import freeze, start_from
from vitlib.train.recipe import Recipe

logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)  # it warns of the rate of a single step

VERSION = 1  # raised when the numbers that a run gives change
# AdamW rates that the search starts around, for a ViT-S; others are scaled by width. What is small trains at higher rates.
FIRST_RATES = {"full": 1e-4, "lora": 1e-3, "norm": 2e-3, "bias": 2e-3, "head": 4e-3}
OTHER_RATE = 2e-4  # attn, ffn, fc1, last-k
MOST_RATES = 12
NARROW = 192  # width; below it a step on CPU is too short for several threads


@dataclass(frozen=True, eq=False)
class Job:
    """What all runs of one command share."""

    task: Task
    trunk: Trunk
    view: View
    folder: Path  # of the runs
    epochs: int = 10
    batch_size: int = 32
    device: str = "auto"

    @functools.cached_property
    def data(self) -> dict[str, DataSet]:
        """Each of PARTS."""
        return {part: self.task.part(part) for part in PARTS}

    @property
    def engine(self) -> Engine:
        device = resolve(self.device)
        return Engine(device, "bf16" if device == "cuda" else "float32")

    def recipe(self, lr: float) -> Recipe:
        augment = self.task.data.augment if self.task.data.streamed else None
        return Recipe(epochs=self.epochs, batch_size=self.batch_size, lr=lr, min_lr=0.0, augment=augment)

    def first_rate(self, strategy: str) -> float:
        """Of one significant digit."""
        rate = FIRST_RATES.get(strategy, OTHER_RATE) * 384 / self.trunk.model.config.width
        return float(f"{rate:.0e}")

    def start(self, strategy: str, seed: int) -> ViT:
        config = self.trunk.config(self.view.image_size, len(self.task.data.classes))
        model = start_from(self.trunk.model.state_dict(), config, seed, new_head=True)
        if strategy == "lora":
            add_adapters(model, seed)
        else:
            freeze(model, strategy)
        return model


@dataclass(frozen=True)
class Run:
    """One model to be trained."""

    strategy: str
    lr: float
    seed: int

    def __post_init__(self) -> None:
        check(self, {}, [("seed", whole(0), "are whole numbers from 0")])

    def place(self, job: Job) -> Path:
        data, recipe = (job.task.checksum, job.trunk.hash, job.view), (job.epochs, job.batch_size)
        names = [VERSION, *data, *recipe, self.strategy, self.lr, self.seed]
        return job.folder / hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.strategy}, rate {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a run went."""

    top1: float  # of the best epoch on the validation part, in percent; -1: the loss was not finite
    loss: float
    epoch: int  # which it was, from 1
    seconds: float  # of training and validation


class Watch(Checkpoints):
    """Validates at the end of each epoch and keeps the best model; checkpoints come after that and know the scores."""

    def __init__(self, place: Path, model: ViT, job: Job, bar: tqdm):
        super().__init__(place / "checkpoint.pth", every_s=60.0, notes={"scores": "[]"}, run=place.name)
        self.place, self.model, self.job, self.bar = place, model, job, bar

    @property
    def scores(self) -> list[list[float]]:
        """Of each epoch, top-1 and -loss: higher is better."""
        return json.loads(self.notes["scores"])

    def read(self, parts) -> list:
        history = super().read(parts)
        self.bar.update(len(history))
        return history

    def write(self, parts, history) -> None:
        self.look(len(history))
        super().write(parts, history)

    def after(self, step: int, steps: int) -> None:
        self.bar.update()
        self.look(step)

    def look(self, step: int) -> None:
        """Validate, where `step` ends an epoch that is not validated yet."""
        scores, per_epoch = self.scores, self.bar.total // self.job.epochs
        if step % per_epoch or step // per_epoch <= len(scores):
            return
        reached, _ = supervised.evaluate(self.model, self.job.data["validation"], self.job.engine)
        loop.set_train_mode(self.model)
        score = [reached["top1"], -reached["loss"]]
        if not scores or score > max(scores):
            self.save("best")
        self.notes["scores"] = json.dumps([*scores, score])

    def save(self, name: str) -> None:
        notes = write_notes(self.job.view, self.job.task.data.classes, trunk=self.job.trunk.hash)
        save(merged(self.model), self.place / f"{name}.safetensors", notes)


def alone(command: Callable) -> Callable:
    """A command that writes to `out`, which no other process does meanwhile: it waits for one that is there."""

    @functools.wraps(command)
    def locked(folder: Path | str, out: Path | str, *given: object, **options: object) -> object:
        place = Path(os.path.realpath(out))
        lock = FileLock(place.parent / f".{place.name}.lock")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"another process writes to {out}: waiting for it (or stop this one, and give another --out)")
            held = lock.acquire()
        except OSError as fault:
            raise UsageError(f"nothing can be written to {str(out)[:200]} ({fault.strerror})") from fault
        with held:
            try:
                return command(folder, out, *given, **options)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)

    return locked


def check_place(out: Path, written: Collection[str]) -> None:
    """Raises UsageError where `out` is there and holds something else than what a command has `written`."""

    def ours(entry: Path) -> bool:
        return entry.name in written and (entry.is_dir() if entry.name == "runs" else entry.is_file())

    if out.exists() and not (out.is_dir() and all(map(ours, out.iterdir()))):
        raise UsageError(f"{out} is there and holds something else: give another place with --out")


def read_record(kind: type, path: Path) -> object:
    """A dataclass that was written as JSON. Raises UsageError where the file is not as it was written."""
    with intact(path):
        record = kind(**json.loads(path.read_text(encoding="utf-8")))
        for field in fields(kind):
            if type(getattr(record, field.name)).__name__ not in (field.type, "int"):
                raise TypeError
    return record


def execute(run: Run, job: Job) -> Outcome:
    """Train a run, go on with it, or read it where it is finished.

    A loss that is not finite is an outcome. Raises UsageError where the memory does not suffice.
    """
    place = run.place(job)
    if (place / "result.json").is_file():
        return read_record(Outcome, place / "result.json")
    model, recipe, train = job.start(run.strategy, run.seed), job.recipe(run.lr), job.data["train"]
    steps = loop.count_steps(recipe, len(train))
    with (
        tqdm(total=steps, desc=str(run), unit="step", disable=None, leave=False) as bar,
        computing(model.config, job.batch_size),
    ):
        watch = Watch(place, model, job, bar)
        inputs = (model, recipe, train, np.arange(len(train)), run.seed, supervised.loss_of(recipe))
        try:
            loop.train(*inputs, on_step=watch.after, engine=job.engine, checkpoints=watch)
            watch.save("last")
            best = max(scores := watch.scores)
            outcome = Outcome(best[0], -best[1], scores.index(best) + 1, watch.wall_s)
        except loop.NonFiniteLoss:
            outcome = Outcome(-1.0, math.inf, 0, watch.wall_s)
    with write_whole(place / "result.json") as draft:
        draft.write_text(json.dumps(asdict(outcome)))
    watch.remove()
    return outcome


def search(job: Job, strategy: str, seed: int) -> dict[float, Outcome]:
    """Rates a factor 2 apart, extended until the best is inside (at most MOST_RATES), in ascending order."""
    first, tried = job.first_rate(strategy), {}
    wanted = [first / 2, first, first * 2]
    while wanted:
        for lr in wanted:
            tried[lr] = execute(Run(strategy, lr, seed), job)
            say(f"  {strategy}, rate {lr:g}: {tried[lr].top1:.1f} % of the validation images")
        best, low, high = best_of(tried), min(tried), max(tried)
        wanted = [best / 2] if best == low else [best * 2] if best == high else []
        if wanted and len(tried) >= MOST_RATES:
            say(f"  the best rate, {best:g}, is at the end of {len(tried)} that were tried")
            break
    return dict(sorted(tried.items()))


def best_of(tried: dict[float, Outcome]) -> float:
    """The rate that did best on the validation part. Raises UsageError where every loss was not finite."""
    best = max(tried, key=lambda lr: (tried[lr].top1, -tried[lr].loss))
    if tried[best].top1 < 0:
        rates = ", ".join(f"{lr:g}" for lr in sorted(tried))
        raise UsageError(f"the loss is not finite at the rates {rates}: give a lower one with --lr")
    return best


@contextlib.contextmanager
def computing(config: ViTConfig, batch_size: int) -> Iterator[None]:
    """Inside, memory that does not suffice is one sentence, and a narrow model has one thread: more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if config.width < NARROW else threads)
    torch.set_flush_denormal(True)  # small LayerScale values make denormal gradients, which are slow on CPU
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if isinstance(fault, RuntimeError) and "memory" not in str(fault).lower():
            raise
        at_once = f"{batch_size} images of {config.image_size} pixels"
        raise UsageError(f"no memory for batches of {at_once}: give a smaller batch or image size") from fault
    finally:
        torch.set_num_threads(threads)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
