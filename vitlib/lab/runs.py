"""Runs: what is trained (a spec), doing it, and the store that keeps it.

A spec's hash covers everything that changes the numbers. Asking the store for a finished run reads it; `execute` trains
a missing one. A run directory is written whole or not at all:

    <store>/<hash>/spec.json  result.json  history.csv  weights.safetensors  [ema.safetensors]

While it is trained, a run that takes long keeps a checkpoint in <store>/.checkpoints/<hash>.pt and goes on from there.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from vitlib import paths
from vitlib.data import DataSet, Shard, load_resized, subset
from vitlib.data.augment import Augment
from vitlib.data.external import held_out
from vitlib.data.readers import locate
from vitlib.data.registry import Facts, data_checksum, facts, published
from vitlib.errors import UsageError, unknown
from vitlib.lab.ledger import ledger_hashes
from vitlib.model import ViT, ViTConfig, set_execution
from vitlib.train import dalle, finetune, loop, masked, tokenizers
from vitlib.train.dvae import DVAE, DVAEConfig, DVAELoss
from vitlib.train.dvae import evaluate as evaluate_dvae
from vitlib.train.engine import Engine, resolve, this_shard
from vitlib.train.losses import loss_of
from vitlib.train.recipes import Recipe
from vitlib.train.state import Checkpoints

if TYPE_CHECKING:
    from vitlib.data.images import Images

# Raised whenever training changes its numbers; tests/test_training.py holds twenty steps that notice.
TRAINING_VERSION = 2  # 2: branches at once (`par`), unread tokens skipped
# What every result says of its surroundings besides its numbers.
ABOUT = ("split", "wall_s", "cpu_s", "mem_mb", "device", "torch", "python", "commit", "date")
LOADERS = 8  # at most so many processes read and decode images which are not in memory
# Seeds from here on are for development and tuning: they evaluate on validation images and are never judged.
FIRST_TUNING_SEED = 1000
ALLOWED = {
    "protocol": ("supervised", "finetune", "masked", "tokenizer"),
    "strategy": finetune.STRATEGIES,
    "targets": ("none", *tokenizers.TARGETS),
    "precision": ("float32", "bf16"),
    "execution": ("seq", "par"),
    "device": ("cpu", "cuda", "auto"),  # auto: a GPU where there is one; the result says what it was
}
# Fields that came after the first runs, with the value that means "as before".
LATER = {"tokenizer": None, "accumulate": 1, "compile": False, "channels_last": False, "checkpointing": False}
LATER_IN_MODEL = {"shrink_deep": False, "head_scale": 1.0, "key_bias": True}
LATER_IN_RECIPE = {"layer_decay": None, "augment": None, "cutmix": 0.0, "smoothing": 0.0, "repeats": 1, "ema": None}


@dataclass(frozen=True)
class RunSpec:
    """One training run. Its hash names it; equal specs are one run, whoever asks."""

    protocol: str  # "supervised" (also from scratch on few labels), "finetune" (from parent), "masked", "tokenizer"
    model: ViTConfig | DVAEConfig  # the second for "tokenizer"
    data: str
    recipe: Recipe
    seed: int = 0
    images: int | None = None  # class-balanced subset of the training images; None = all
    parent: RunSpec | None = None
    strategy: str = "full"
    targets: str = "none"  # of masked pre-training: see train/tokenizers.py
    tokenizer: RunSpec | None = None  # that makes the targets "dvae"
    masked: int = 0  # patches masked in each image
    # Fixed by the profile, the same on every machine.
    precision: str = "float32"
    execution: str = "seq"
    threads: int = 1
    device: str = "cpu"
    accumulate: int = 1  # parts of a batch that go through the model one after the other, or on several GPUs at once
    compile: bool = False
    channels_last: bool = False
    checkpointing: bool = False  # activations are computed again in the backward pass

    def __post_init__(self) -> None:
        for field, allowed in ALLOWED.items():
            if getattr(self, field) not in allowed:
                raise unknown(field, getattr(self, field), allowed)
        if (self.protocol == "finetune") != (self.parent is not None):
            raise UsageError(f"a {self.protocol} run {'needs a' if self.protocol == 'finetune' else 'has no'} parent")
        if (self.protocol == "tokenizer") != isinstance(self.model, DVAEConfig):
            raise UsageError(f"a {self.protocol} run trains no {type(self.model).__name__}")
        if (self.targets == "dvae") != (self.tokenizer is not None):
            raise UsageError(f"targets {self.targets!r} {'need a' if self.targets == 'dvae' else 'have no'} tokenizer")
        if self.tokenizer:
            own, theirs = ((m.grid, m.in_chans) for m in (self.model, self.tokenizer.model))
            seen = (self.recipe.augment and self.recipe.augment.view_size) or self.model.image_size
            if self.tokenizer.protocol != "tokenizer" or own != theirs or seen != self.tokenizer.model.image_size:
                raise UsageError(f"{self.tokenizer.model.name} gives no token to each patch of {self.model.name}")
        if type(self.accumulate) is not int or not 1 <= self.accumulate <= self.recipe.batch_size:
            batch = self.recipe.batch_size
            raise UsageError(f"accumulate is {self.accumulate!r}: allowed are 1 to {batch} parts of a batch of {batch}")

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits over all fields, what the data is, the parent's hash and TRAINING_VERSION."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict:
        """What is hashed, and what spec.json holds."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record |= {"model": asdict(self.model), "recipe": asdict(self.recipe)}
        record |= {name: spec and spec.hash for name, spec in (("parent", self.parent), ("tokenizer", self.tokenizer))}
        if self.targets == "dalle":
            record["dalle_checksum"] = dalle.checksum()
        # Fields that came later are written only where they are set, so that older runs keep their hashes.
        later = ((record, LATER), (record["model"], LATER_IN_MODEL), (record["recipe"], LATER_IN_RECIPE))
        for part, defaults in later:
            for name, default in defaults.items():
                if name in part and part[name] == default:  # a tokenizer's model has other fields
                    del part[name]
        checksum = data_checksum(self.data, self.from_files)
        return record | {"data_checksum": checksum, "training_version": TRAINING_VERSION}

    @classmethod
    def from_fields(cls, whole: dict) -> RunSpec:
        """A spec from `dataclasses.asdict` of one that went through JSON: how it reaches other processes.

        (`record` holds the hashes of the runs it needs; this holds those runs.)
        """

        def plain(values: dict) -> dict:  # JSON has lists for our tuples
            return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}

        whole, recipe = dict(whole), plain(whole["recipe"])
        recipe["augment"] = recipe["augment"] and Augment(**plain(recipe["augment"]))
        kind = DVAEConfig if whole["protocol"] == "tokenizer" else ViTConfig
        whole |= {"recipe": Recipe(**recipe), "model": kind(**plain(whole["model"]))}
        whole |= {name: whole[name] and cls.from_fields(whole[name]) for name in ("parent", "tokenizer")}
        return cls(**whole)

    def with_seed(self, seed: int) -> RunSpec:
        """The same run, and the same trunk and tokenizer, at another seed."""
        parent, tokenizer = (spec and spec.with_seed(seed) for spec in (self.parent, self.tokenizer))
        return replace(self, seed=seed, parent=parent, tokenizer=tokenizer)

    @property
    def needs(self) -> tuple[RunSpec, ...]:
        """The runs whose weights this one starts with: its tokenizer, its parent."""
        return tuple(spec for spec in (self.tokenizer, self.parent) if spec is not None)

    def family(self) -> Iterator[RunSpec]:
        """What it needs first, then this run."""
        for spec in self.needs:
            yield from spec.family()
        yield self

    @property
    def split(self) -> str:
        """The split that accuracy is measured on."""
        return "test" if self.seed < FIRST_TUNING_SEED else "validation"

    @property
    def from_files(self) -> bool:
        """Images are read from their files as they are needed, and augmented one by one; else they are held in memory."""
        return self.recipe.augment is not None

    @property
    def facts(self) -> Facts:
        return published(self.data) if self.from_files else facts(self.data)

    @property
    def training_images(self) -> int:
        return self.images or self.facts.sizes["train"]

    @property
    def steps(self) -> int:
        return loop.count_steps(self.recipe, self.training_images)


@dataclass(frozen=True)
class Result:
    """A finished run: metrics, which images were right, and where and when it ran."""

    hash: str
    metrics: dict[str, float]
    correct: np.ndarray | None  # bool (images of the split,), in the split's order; None for masked pre-training
    ledger: dict[str, str]  # hash of every part of a claim when the run began
    about: dict  # split, wall_s, cpu_s, mem_mb, gpu_mem_mb, device, world (processes), versions, commit, date, files
    correct_v2: np.ndarray | None = None  # the same of ImageNet-V2, where it was there

    @property
    def files(self) -> dict[str, str]:
        """Split -> checksum of its listing; empty for images in memory, whose pixels are in the hash, and in older results."""
        return self.about.get("files", {})

    def record(self) -> dict:
        more = {} if self.correct_v2 is None else {"correct_v2": _packed(self.correct_v2)}
        return {
            "hash": self.hash, "metrics": self.metrics, "correct": _packed(self.correct), "ledger": self.ledger,
            **more, **self.about,
        }  # fmt: skip

    @classmethod
    def from_record(cls, record: dict) -> Result:
        """Raises KeyError or ValueError for a record that is not whole or contradicts itself."""
        record = dict(record)
        packed, packed_v2 = record.pop("correct"), record.pop("correct_v2", None)
        named = {name: record.pop(name) for name in ("hash", "metrics", "ledger")}
        if absent := [name for name in ABOUT if name not in record]:
            raise KeyError(", ".join(absent))
        correct = packed and _unpacked(packed, named["metrics"], "top1")
        correct_v2 = packed_v2 and _unpacked(packed_v2, named["metrics"], "top1_v2")
        return cls(correct=correct, about=record, correct_v2=correct_v2, **named)


def _packed(correct: np.ndarray | None) -> dict | None:
    """Which images were right, one bit each."""
    if correct is None:
        return None
    return {"images": len(correct), "bits": base64.b64encode(np.packbits(correct).tobytes()).decode()}


def _unpacked(packed: dict, metrics: dict[str, float], name: str) -> np.ndarray:
    """Bool (images,). Raises ValueError where the bits contradict the accuracy of that name."""
    bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
    if len(bits) != -(-packed["images"] // 8):
        raise ValueError(f"{len(bits)} bytes of bits for {packed['images']} images")
    correct = np.unpackbits(bits, count=packed["images"]).astype(bool)
    if not np.isclose(100 * correct.mean(), metrics[name]):
        raise ValueError(f"{name} is not what the bits say")
    return correct


# ---------------------------------------------------------------------------------------------------- the store


def find(spec: RunSpec) -> Result | None:
    """The finished run, or None. Raises UsageError for a run directory that another version wrote."""
    path = paths.runs() / spec.hash / "result.json"
    if not path.is_file():
        return None
    try:
        result = Result.from_record(json.loads(path.read_text(encoding="utf-8")))
        if result.hash != spec.hash:
            raise ValueError(f"it says {result.hash}")
        return result
    except (ValueError, KeyError, TypeError) as fault:
        raise UsageError(
            f"the run {spec.hash} in {paths.runs()} is not in the form of this version ({type(fault).__name__}: {fault}): "
            "move that folder away and the run is trained again"
        ) from fault


def weights(spec: RunSpec, ema: bool = False) -> dict[str, torch.Tensor]:
    """The trained weights of a finished run, or their moving average. Raises UsageError where only its metrics were imported."""
    if ema and spec.recipe.ema is None:
        raise UsageError(f"the run {spec.hash} ({describe(spec)}) keeps no moving average: its recipe's ema is None")
    path = weights_path(spec).with_name("ema.safetensors") if ema else weights_path(spec)
    if not path.is_file():
        what = "moving average" if ema else "weights"
        raise UsageError(f"the run {spec.hash} has no {what} in {paths.runs()} (imported runs have metrics only)")
    return load_file(path)


def weights_path(spec: RunSpec) -> Path:
    return paths.runs() / spec.hash / "weights.safetensors"


def checkpoint_path(spec: RunSpec) -> Path:
    return paths.runs() / ".checkpoints" / f"{spec.hash}.pt"


def lock(name: str) -> FileLock:
    """Held while the run of that hash is trained or imported: a second process waits and then reads it."""
    folder = paths.runs() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def held(name: str, shard: Shard) -> AbstractContextManager:
    """The lock, waited for. Raises UsageError where it cannot be: the other processes of a distributed run would give up."""
    try:
        return lock(name).acquire(timeout=-1 if shard.world == 1 else 0)
    except Timeout:
        raise UsageError(f"the run {name} is held by another process: a distributed run does not wait for it") from None


def keep(
    spec: RunSpec, result: Result, history: list[loop.Step], model: torch.nn.Module, ema: torch.nn.Module | None = None
) -> None:
    """Write a run into a temporary folder and move it into place. Of a masked model the trunk is kept."""
    draft = _draft(spec.hash)
    try:
        (draft / "spec.json").write_text(json.dumps(spec.record(), indent=1), encoding="utf-8")
        with (draft / "history.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([f.name for f in fields(loop.Step)])
            table.writerows([s.step, s.epoch, s.lr, s.loss] for s in history)
        for name, whole in (("weights", model), ("ema", ema)):
            if whole is not None:
                state = (whole.vit if spec.protocol == "masked" else whole).state_dict()
                save_file({k: v.cpu().contiguous() for k, v in state.items()}, draft / f"{name}.safetensors")
        (draft / "result.json").write_text(json.dumps(result.record(), indent=1), encoding="utf-8")
        _into_place(draft, paths.runs() / spec.hash)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(name: str) -> Path:
    """A new folder in the store that is not a run yet; its name says whose it is."""
    paths.runs().mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".draft-{name}-{platform.node()}-{os.getpid()}-", dir=paths.runs()))


def _into_place(draft: Path, folder: Path) -> None:
    """Rename; an older folder of that name (an imported run without weights) goes only when the new one is there."""
    old = draft.with_name(f"{draft.name}-old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sweep() -> None:
    """Remove the drafts that processes of this machine left and that are gone."""
    for draft in paths.runs().glob(".draft-*"):
        words = draft.name.removesuffix("-old").rsplit("-", 2)
        if words[0].endswith(f"-{platform.node()}") and words[1].isdigit() and not alive(int(words[1])):
            shutil.rmtree(draft, ignore_errors=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def export_runs(path: Path, names: Collection[str] | None = None) -> int:
    """Write every run of the store, or those of these hashes, to a `runs.jsonl`, by hash, without weights; how many."""
    records = []
    folders = sorted(result.parent for result in paths.runs().glob("[0-9a-f]*/result.json"))
    for folder in folders if names is None else [f for f in folders if f.name in names]:
        try:
            spec, result = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("spec", "result"))
            Result.from_record(result)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            what = f"the run {folder.name} cannot be exported ({type(fault).__name__}): move that folder away"
            raise UsageError(what) from fault
        records.append(json.dumps({"spec": spec, "result": result}, sort_keys=True))
    if path.is_dir():
        raise UsageError(f"{path} is a folder: export writes a file, for example {path / 'runs.jsonl'}")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text("".join(f"{record}\n" for record in records), encoding="utf-8")
    draft.replace(path)
    return len(records)


def import_runs(path: Path) -> tuple[int, int]:
    """Merge a `runs.jsonl` into the store by hash: (new, already there). Metrics and correctness, no weights.

    Raises UsageError, before anything is written, for a line that is not a run or whose hash is not that of its spec.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path} to import")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as fault:
        raise UsageError(f"{path.name} is no text file: import reads what export wrote") from fault
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            run = json.loads(line)
            found = hashlib.sha256(json.dumps(run["spec"], sort_keys=True).encode()).hexdigest()[:16]
            Result.from_record(run["result"])
        except (ValueError, KeyError, TypeError) as fault:
            raise UsageError(f"line {number} of {path.name} is not a run ({type(fault).__name__})") from fault
        if found != run["result"]["hash"]:
            raise UsageError(f"line {number} of {path.name} says {run['result']['hash']}, but its spec is {found}")
        runs.append((found, run))
    new = 0
    for name, run in runs:
        folder = paths.runs() / name
        with lock(name):
            if (folder / "result.json").is_file():
                continue
            draft = _draft(name)
            for part in ("spec", "result"):
                (draft / f"{part}.json").write_text(json.dumps(run[part], indent=1), encoding="utf-8")
            _into_place(draft, folder)
            new += 1
    return new, len(runs) - new


def warn_of_other_files(read: Mapping[RunSpec, Mapping[str, str]]) -> None:
    """Warn where runs that belong together read files that differ, of what is one data set by its name and its sizes."""
    seen: dict[tuple[str, str, str], dict[str, str]] = {}
    for spec, files in read.items():
        for split, checksum in files.items():
            seen.setdefault((spec.data, spec.split, split), {}).setdefault(checksum, spec.hash)
    for (data, _, split), by in seen.items():
        if len(by) > 1:
            warnings.warn(
                f"the runs {', '.join(sorted(by.values()))} read different files of {data}, split {split}: names, sizes or labels "
                "are not the same",
                stacklevel=2,
            )


def missing(specs: Iterable[RunSpec]) -> dict[RunSpec, bool]:
    """What must be trained so that every spec is finished, parents first, each once; True = its weights are needed."""
    todo: dict[RunSpec, bool] = {}

    def train(spec: RunSpec, need_weights: bool) -> None:
        for other in spec.needs:
            if not weights_path(other).is_file():
                train(other, True)
        todo[spec] = todo.get(spec, False) or need_weights

    for spec in specs:
        if find(spec) is None:
            train(spec, False)
    return todo


# ---------------------------------------------------------------------------------------------------- doing it


def execute(
    spec: RunSpec,
    need_weights: bool = False,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    every_s: float = 300.0,
) -> Result:
    """Train a run, or read it where it is finished. What it needs must be finished, with weights.

    `need_weights` trains a run again of which only the metrics were imported. A checkpoint is written every `every_s`
    seconds; a run that was killed goes on from it. Raises NonFiniteLoss with the run's name; the run is not kept then,
    the last good checkpoint is. All processes of a distributed run call this; the first one writes.
    """
    engine = engine_of(spec)
    first = engine.shard.rank == 0
    with held(spec.hash, engine.shard) if first else nullcontext():
        engine.gather(None)  # the others look when the first one holds the lock
        done = find(spec)
        if done is not None and not (need_weights and not weights_path(spec).is_file()):
            return done
        torch.set_num_threads(spec.threads)
        torch.set_flush_denormal(True)  # small LayerScale values make denormal gradients, which are slow on CPU
        checkpoints = Checkpoints(checkpoint_path(spec), every_s, ledger_hashes(), writes=first)
        data = data_of(spec, "train")
        held_out = data_of(spec, spec.split)  # read now, so that a fault costs no time
        other = second_test(spec)
        read = {"train": data, spec.split: held_out, "v2": other} if first and spec.from_files else {}
        files = {split: images.checksum for split, images in read.items() if images is not None}
        if files:
            warn_of_other_files({m: r.files for m in spec.needs if (r := find(m))} | {spec: files})
        rows = subset(data, spec.images, spec.seed)
        model, loss_function = prepare(spec, data)
        ema = None if spec.recipe.ema is None else ModelEmaV3(model, spec.recipe.ema)
        if engine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            history = loop.train(
                model, spec.recipe, data, rows, spec.seed, loss_function, on_step, engine, ema, checkpoints
            )
        except loop.NonFiniteLoss as fault:
            raise loop.NonFiniteLoss(f"run {spec.hash} ({describe(spec)}): {fault}") from None
        metrics = {"first_loss": history[0].loss, "train_loss": float(np.mean([s.loss for s in history[-20:]]))}
        correct = correct_v2 = None
        if spec.protocol == "tokenizer":
            metrics |= evaluate_dvae(model, held_out)
        elif spec.protocol != "masked":
            correct, loss = loop.evaluate(model, held_out, engine=engine)
            metrics |= {"top1": 100 * float(correct.mean()), "loss": loss}
            if other is not None:
                correct_v2, _ = loop.evaluate(model, other, engine=engine)
                metrics["top1_v2"] = 100 * float(correct_v2.mean())
            if ema is not None:
                averaged, loss = loop.evaluate(ema.module, held_out, engine=engine)
                metrics |= {"top1_ema": 100 * float(averaged.mean()), "loss_ema": loss}
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise loop.NonFiniteLoss(
                f"run {spec.hash} ({describe(spec)}): the last step left weights that are not finite; {checkpoints}"
            )
        metrics |= {"trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        about = {"split": spec.split, "wall_s": checkpoints.wall_s, "cpu_s": checkpoints.cpu_s}
        about |= surroundings(engine.device) | {"world": engine.shard.world} | ({"files": files} if files else {})
        result = Result(spec.hash, metrics, correct, checkpoints.notes, about, correct_v2)
        if first:
            keep(spec, result, history, model, ema and ema.module)
            checkpoints.remove()
        engine.gather(None)  # nobody leaves before it is written
        return result


def engine_of(spec: RunSpec) -> Engine:
    """What the run is computed with here. Raises UsageError for a GPU that is not there."""
    own = {
        name: getattr(spec, name) for name in ("precision", "accumulate", "compile", "channels_last", "checkpointing")
    }
    return Engine(resolve(spec.device), **own, shard=this_shard())


def data_of(spec: RunSpec, split: str) -> DataSet | Images:
    """A split at the size that the model reads: held in memory, or read as it is needed.

    Published data has no validation images: a tuning run holds some out of its own training images, of each class the last
    fiftieth; a judged run trains on all of them.
    """
    if not spec.from_files:
        return load_resized(spec.data, split, spec.model.image_size)
    classes = spec.model.num_classes if spec.protocol in ("supervised", "finetune") else None
    part = "test" if split == "test" else "train"
    data = _open(spec, spec.data, part, classes)
    if spec.split == "test" or split == "test":
        return data
    held = held_out(data.labels.numpy(), share=50)
    return data.take(np.flatnonzero(held if split == "validation" else ~held))


def _open(spec: RunSpec, name: str, split: str, classes: int | None) -> Images:
    from vitlib.data import images

    return images.open_images(
        name, split, spec.model.image_size, augment=spec.recipe.augment, num_classes=classes, workers=loaders()
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loaders() -> int:
    """Processes that decode for this one: its share of the cores, where several processes of a run are on this machine."""
    return min(LOADERS, max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))


def second_test(spec: RunSpec) -> Images | None:
    """ImageNet-V2 beside ImageNet-val, where it is here."""
    classifies = spec.protocol in ("supervised", "finetune") and spec.split == "test"
    if not (classifies and spec.from_files and spec.data == "imagenet-1k" and locate("imagenet-v2")):
        return None
    return _open(spec, "imagenet-v2", "test", spec.model.num_classes)


def prepare(spec: RunSpec, data) -> tuple[torch.nn.Module, loop.LossFunction]:
    """The model at its start and the loss function of its protocol."""
    if spec.protocol == "tokenizer":
        return DVAE(spec.model, spec.seed), DVAELoss(spec.seed, spec.steps)
    if spec.protocol == "masked":
        tokenizer = dalle.load(spec.model.grid) if spec.targets == "dalle" else None
        tokenizer = trained_tokenizer(spec.tokenizer) if spec.tokenizer else tokenizer
        tokenizer = tokenizer and tokenizer.to(resolve(spec.device))
        targets = tokenizers.make_targets(spec.targets, data, spec.model.patch_size, spec.seed, tokenizer)
        model = masked.MaskedViT(spec.model, targets.outputs, spec.seed)
        set_execution(model.vit, spec.execution)
        return model, masked.MaskedLoss(targets, spec.seed, spec.masked)
    if spec.protocol == "finetune":
        other_classes = spec.data != spec.parent.data
        model = finetune.start_from(weights(spec.parent), spec.model, spec.seed, new_head=other_classes)
        finetune.freeze(model, spec.strategy)
    else:
        model = ViT(spec.model, spec.seed)
    set_execution(model, spec.execution)
    return model, loss_of(spec.recipe)


def trained_tokenizer(spec: RunSpec) -> DVAE:
    """The discrete VAE of a finished run, in eval mode."""
    model = DVAE(spec.model, spec.seed)
    model.load_state_dict(weights(spec))
    return model.eval()


def describe(spec: RunSpec) -> str:
    """A run in a few words, for progress lines and errors."""
    parts = [spec.protocol, spec.data, spec.model.name, f"{spec.model.image_size} px"]
    parts += [f"stem {spec.model.stem}"] if spec.protocol != "tokenizer" else []
    parts += [f"{spec.images} images"] if spec.images else []
    parts += [spec.strategy] if spec.protocol == "finetune" else []
    return ", ".join([*parts, f"seed {spec.seed}"])


def surroundings(device: str) -> dict:
    """Where and with what a run was done."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    gpu = {"gpu_mem_mb": round(torch.cuda.max_memory_allocated() / 2**20)} if device == "cuda" else {}
    return gpu | {
        "mem_mb": round(peak), "device": device_name(device), "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


@functools.cache
def device_name(device: str) -> str:
    """The name of what a run used: the GPU's for "cuda", else the processor's and the number of its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


@functools.cache
def commit() -> str:
    """The commit of this checkout, with `+` where code was changed since; empty outside git."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=paths.ROOT, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "vitlib", "outputs/paper") else ""
    )
