"""The store of finished runs. A run directory is written whole or not at all:

    <store>/<hash>/spec.json  result.json  history.csv  weights.safetensors  [ema.safetensors, predictor.safetensors]

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
from lab.runs.results import FAULTS, Result, parsed, read_runs
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.files import (
    abandoned,
    check_target,
    draft_name,
    intact,
    no_room,
    read_safetensors,
    sha256,
    sweep,
    write_safetensors,
    write_whole,
)
from vitlib.train import PROTOCOLS, loop

if TYPE_CHECKING:
    import pandas as pd

OLD = "-old"  # how the name of a folder that was put aside ends
AGAIN = "move that folder away and it is trained again"


def folders() -> list[Path]:
    """Those of the finished runs, by hash."""
    return sorted(path.parent for path in paths.runs().glob("[0-9a-f]*/result.json"))


def read(folder: Path) -> tuple[dict, Result]:
    """What was trained (`RunSpec.record`), and the result. Raises UsageError for what is damaged or of another version."""
    files = [folder / f"{name}.json" for name in ("spec", "result")]
    try:
        if not all(file.is_file() for file in files):  # a pipe would be waited for
            raise FileNotFoundError("spec.json or result.json is not there")
        run = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
        record, result = parsed(run)
        if result.hash != folder.name:
            raise ValueError(f"it says {result.hash}")
        return record, result
    except (OSError, *FAULTS) as fault:
        what = f"{folder.parent} is not in the form of this version ({type(fault).__name__}: {fault})"
        raise UsageError(f"the run {folder.name} in {what}: {AGAIN}") from fault


def find(spec: RunSpec) -> Result | None:
    """The result of a finished run, or None. Raises UsageError as `read`."""
    if not spec.ready:
        return None
    folder = paths.runs() / spec.hash
    return read(folder)[1] if (folder / "result.json").is_file() else None


def weights(spec: RunSpec, name: str = "weights") -> dict[str, Tensor]:
    """The trained weights of a finished run, or its "predictor" (`Protocol.predictor`).

    Raises UsageError where they are not there, or not as they were written.
    """
    path, result = weights_path(spec, name), find(spec)
    if not path.is_file():
        raise UsageError(f"the run {spec.hash} has no {name} in {paths.runs()} (imported runs have metrics only)")
    state, _ = read_safetensors(path)
    wanted = result and result.about.get("sha256", {}).get(name)  # older results have none
    if wanted and sha256(path) != wanted:
        raise UsageError(f"{path} is damaged: its SHA-256 is not the one in result.json; {AGAIN}")
    return state


def history(spec: RunSpec) -> pd.DataFrame | None:
    """The lines of a run's history.csv, one per step; None where they are not here (imported runs have metrics only)."""
    import pandas as pd

    path = weights_path(spec).with_name("history.csv")
    with intact(path):
        return pd.read_csv(path) if path.is_file() else None


def weights_path(spec: RunSpec, name: str = "weights") -> Path:
    return paths.runs() / spec.hash / f"{name}.safetensors"


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
    """Write a run into a temporary folder and move it into place; of a masked model the backbone is its weights.

    The result gets the SHA-256 of the weights. Raises UsageError where there is no room on the disk.
    """
    goes_on = "free some, and the same command goes on from the last checkpoint"
    with no_room(f"for the {spec} in {paths.runs()}: {goes_on}"), _new_folder(spec.record(), result) as draft:
        with write_whole(draft / "history.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([f.name for f in fields(loop.Step)])
            table.writerows(map(astuple, history))
        protocol = PROTOCOLS[spec.protocol]
        states = {"weights": protocol.keeps(model).state_dict(), "predictor": protocol.predictor(model)}
        for name, state in (states | {"ema": ema and protocol.keeps(ema).state_dict()}).items():
            if state:
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
    check_target(path, (".jsonl",))
    runs = [read(folder) for folder in folders() if names is None or folder.name in names]
    lines = [json.dumps({"spec": record, "result": result.record()}, sort_keys=True) + "\n" for record, result in runs]
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


def missing(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """What must be trained so that every spec is finished, what is needed first, each once.

    An imported run has no weights, and is trained again where a missing one starts with them.
    """

    def chain(spec: RunSpec) -> Iterator[RunSpec]:
        for other in spec.needs:
            if not (other.ready and weights_path(other).is_file()):
                yield from chain(other)
        yield spec

    return list(dict.fromkeys(one for spec in specs if find(spec) is None for one in chain(spec)))
