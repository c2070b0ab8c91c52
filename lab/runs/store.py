"""The store of finished runs. A run directory is written whole or not at all:

    <store>/<hash>/spec.json  result.json  history.csv  weights.safetensors  [ema.safetensors]

While it is trained, a run that takes long keeps a checkpoint in <store>/.checkpoints/<hash>.pt.
"""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from torch import Tensor, nn

from lab import paths
from lab.runs.results import FAULTS, Result, read_runs
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.files import abandoned, draft_name, no_room, read_safetensors, sha256, sweep, write_safetensors, write_whole
from vitlib.train import PROTOCOLS, loop

OLD = "-old"  # how the name of a folder that was put aside ends
AGAIN = "move that folder away and it is trained again"


if TYPE_CHECKING:
    import pandas as pd


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
    except (OSError, *FAULTS) as fault:
        what = f"{paths.runs()} is not in the form of this version ({type(fault).__name__}: {fault})"
        raise UsageError(f"the run {spec.hash} in {what}: {AGAIN}") from fault


def finished(spec: RunSpec, need_weights: bool = False) -> bool:
    """Whether the run is in the store; with its weights, where those are needed."""
    return find(spec) is not None and (weights_path(spec).is_file() or not need_weights)


def weights(spec: RunSpec, ema: bool = False) -> dict[str, Tensor]:
    """The trained weights of a finished run, or their moving average.

    Raises UsageError where they are not in the store, or not as they were written.
    """
    if ema and spec.recipe.ema is None:
        raise UsageError(f"the {spec} keeps no moving average: its recipe's ema is None")
    name, what = ("ema", "moving average") if ema else ("weights", "weights")
    path = weights_path(spec).with_name(f"{name}.safetensors")
    if not path.is_file():
        raise UsageError(f"the run {spec.hash} has no {what} in {paths.runs()} (imported runs have metrics only)")
    state, _ = read_safetensors(path)
    result = find(spec)
    wanted = result and result.about.get("sha256", {}).get(name)  # older results have none
    if wanted and sha256(path) != wanted:
        raise UsageError(f"{path} is damaged: its SHA-256 is not the one in result.json; {AGAIN}")
    return state


def history(spec: RunSpec) -> pd.DataFrame | None:
    """The lines of a run's history.csv, one per step; None where they are not here (imported runs have metrics only)."""
    import pandas as pd

    path = paths.runs() / spec.hash / "history.csv"
    return pd.read_csv(path) if path.is_file() else None


def weights_path(spec: RunSpec) -> Path:
    return paths.runs() / spec.hash / "weights.safetensors"


def checkpoint_path(spec: RunSpec) -> Path:
    return paths.runs() / ".checkpoints" / f"{spec.hash}.pt"


def held(name: str, wait: bool = True) -> AbstractContextManager:
    """The lock of the run of that hash, held while it is trained or imported: a second process waits and then reads it.

    wait=False, for distributed runs, whose other processes would time out: UsageError where another process holds it.
    """
    folder = paths.runs() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / f"{name}.lock").acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UsageError(f"the run {name} is held by another process: a distributed run does not wait for it") from None


def keep(
    spec: RunSpec, result: Result, history: list[loop.Step], model: nn.Module, ema: nn.Module | None = None
) -> None:
    """Write a run into a temporary folder and move it into place. Of a masked model the backbone is kept.

    The result gets the SHA-256 of the weights. Raises UsageError where there is no room on the disk.
    """
    goes_on = "free some, and the same command goes on from the last checkpoint"
    with no_room(f"for the {spec} in {paths.runs()}: {goes_on}"), _new_folder(spec.record(), result) as draft:
        with write_whole(draft / "history.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([f.name for f in fields(loop.Step)])
            table.writerows(map(astuple, history))
        for name, whole in (("weights", model), ("ema", ema)):
            if whole is not None:
                state = PROTOCOLS[spec.protocol].keeps(whole).state_dict()
                write_safetensors(draft / f"{name}.safetensors", state)
                result.about.setdefault("sha256", {})[name] = sha256(draft / f"{name}.safetensors")


@contextmanager
def _new_folder(record: dict, result: Result) -> Iterator[Path]:
    """A draft that becomes the run's folder when the block ends; its name says which process writes it.

    An older folder of that name (an imported run without weights) goes only when the new one is there: where a kill falls
    between the two, `sweep_store` brings it back.
    """
    folder = paths.runs() / result.hash
    draft = folder.with_name(f"{draft_name()}-{result.hash}")
    old = draft.with_name(f"{draft.name}{OLD}")
    draft.mkdir(parents=True)
    try:
        yield draft
        for name, written in (("spec", record), ("result", result.record())):
            with write_whole(draft / f"{name}.json") as path:
                path.write_text(json.dumps(written, indent=1), encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sweep_store() -> None:
    """Remove the drafts of processes of this machine that are gone, and bring back what they had put aside."""
    for old in paths.runs().glob(f".draft-*{OLD}"):
        if not (folder := old.with_name(old.name.removesuffix(OLD)[-16:])).exists() and abandoned(old):
            old.rename(folder)
    for folder in (paths.runs(), paths.runs() / ".checkpoints"):
        sweep(folder)


def export_runs(path: Path, names: Collection[str] | None = None) -> int:
    """Write every run of the store, or those of these hashes, to a `runs.jsonl`, by hash, without weights; how many."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        fault = "a folder" if path.is_dir() else "in no folder that is there"
        raise UsageError(f"{path} is {fault}: export writes a file, for example runs.jsonl")
    lines = []
    for folder in sorted(result.parent for result in paths.runs().glob("[0-9a-f]*/result.json")):
        if names is None or folder.name in names:
            try:
                run = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("spec", "result")}
                Result.from_record(run["result"])
            except (OSError, *FAULTS) as fault:
                what = f"cannot be exported ({type(fault).__name__}): move that folder away"
                raise UsageError(f"the run {folder.name} {what}") from fault
            lines.append(json.dumps(run, sort_keys=True) + "\n")
    with write_whole(path) as draft:
        draft.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def import_runs(path: Path) -> tuple[int, int]:
    """Merge a `runs.jsonl` into the store by hash: (new, already there). Metrics and correctness, no weights.

    Raises UsageError, as `read_runs` does, before anything is written.
    """
    runs, new = list(read_runs(path)), 0
    for record, result in runs:
        with held(result.hash):
            if not (paths.runs() / result.hash / "result.json").is_file():
                with _new_folder(record, result):
                    new += 1
    return new, len(runs) - new


def warn_of_other_files(read: Mapping[RunSpec, Mapping[str, str]]) -> None:
    """Warn where runs that belong together read files that differ, of what is one data set by its name and its sizes."""
    seen: dict[tuple[str, str, str], dict[str, str]] = {}  # data and split -> checksum -> the first run that read it
    for spec, files in read.items():
        for split, checksum in files.items():
            seen.setdefault((spec.data, spec.split, split), {}).setdefault(checksum, spec.hash)
    for (data, _, split), runs in seen.items():
        if len(runs) > 1:
            what = f"different files of {data}, split {split}: names, sizes or labels are not the same"
            warnings.warn(f"the runs {', '.join(sorted(runs.values()))} read {what}", stacklevel=2)


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
