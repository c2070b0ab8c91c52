"""Runs a benchmark: each restart in a fresh process, in which the arms take turns; writes and prints the table.

A case is one comparison at one size. A slow phase of the machine meets all arms of a process alike, so that ratios are
steadier than times; the process restart is the unit of statistics. Beside each time are the multiply-adds of the step,
counted. Results go to outputs/<profile>/bench/<name>.csv, one row per restart and arm, as each case is done.

Measuring needs torch and timm alone; printing needs pandas.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lab import paths
from lab.experiments.profiles import Profile
from lab.runs.execute import device_name, now
from lab.runs.launch import MEMORY
from lab.runs.processes import cores
from vitlib.errors import UsageError
from vitlib.files import intact, write_whole
from vitlib.train.engine import resolve

if TYPE_CHECKING:
    import pandas as pd

SECONDS_PER_ARM = 4.0  # timed steps of the slowest arm in one process, about
REPEATS = (3, 30)  # at least, at most
WARM_UP = 2
# columns that are texts, also where one looks like a number (a hash such as 5e12...)
TEXTS = ("case", "arm", "precision", "kind", "device", "torch", "date", "run", "part", "ledger")
MORE = ("saved_mb", "state_mb", "mem_mb", "images_per_s")  # columns that only some benchmarks have


@dataclass(frozen=True)
class Case:
    """One comparison at one size."""

    name: str
    measure: str  # "module:function", called in a fresh process with (task, device, dtype): {arm: Reading}
    task: dict  # what `measure` needs
    reference: str  # ratios are this arm's time over each other arm's
    restarts: int
    threads: int = 0  # 0: all cores
    part: str = ""  # the part of a claim that is judged on these rows
    run: str = ""  # hash of the run whose step is timed


class Bench(NamedTuple):
    """What a benchmark compares on a device ("cpu" or "cuda") at a profile."""

    name: str
    cases: Callable[[Profile, str], list[Case]]


class Arm(NamedTuple):
    """One way to do a step. `fresh()` makes an input, untimed; `step(input)` is timed."""

    fresh: Callable[[], object]
    step: Callable[[object], object]


class Reading(NamedTuple):
    """One arm in one process."""

    seconds: list[float]  # of each repetition
    macs: int = 0  # of a step
    more: Mapping[str, float] = {}  # further columns


def run(
    bench: Bench, profile: Profile, device: str = "", restarts: int = 0, only: str = "", stamps: Mapping[str, str] = {},
) -> list[dict]:  # fmt: skip
    """Measure, and write outputs/<profile>/bench/<name>.csv as each case is done; all its rows.

    `restarts` replaces each case's number; `only` picks the cases whose name contains it; `stamps` are the hashes of the
    ledger's entries by part, written beside the times that a part is judged on. Rows of other cases in an existing file
    stay. Raises UsageError for a device that is not there and a text that no case contains.
    """
    device = resolve(device or "auto")
    every, path = bench.cases(profile, device), path_of(bench.name, profile)
    chosen = [case for case in every if only in case.name]
    if not chosen:
        raise UsageError(f"no case of {bench.name} contains {only!r}: there are {'; '.join(c.name for c in every)}")
    for case in chosen:
        rows, count = [], restarts or case.restarts
        for restart in range(count):
            print(f"{bench.name}: {case.name}, restart {restart + 1} of {count}", file=sys.stderr, flush=True)
            rows += [row | {"restart": restart} for row in restarted(case, device, stamps.get(case.part, ""))]
        known = {c.name for c in every} - {case.name}  # rows of cases that exist no more go
        write(path, [row for row in read(path) if row["case"] in known] + rows)
    return read(path)


def restarted(case: Case, device: str, stamp: str = "") -> list[dict]:
    """The rows of one fresh process, one per arm. Raises UsageError where it fails."""
    command, order = [sys.executable, "-m", "lab.bench.runner"], pickle.dumps((case, device, stamp))
    done = subprocess.run(command, input=order, capture_output=True, env=MEMORY | os.environ)
    if done.returncode:
        raise UsageError(f"the process for {case.name} failed: {done.stderr.decode().strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(case: Case, device: str, stamp: str) -> list[dict]:
    """In the process of a restart: its rows."""
    torch.set_num_threads(case.threads or cores())
    torch.set_flush_denormal(True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    readings = pkgutil.resolve_name(case.measure)(case.task, device, dtype)
    about = {
        "precision": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "kind": device,
        "device": device_name(device), "torch": torch.__version__, "date": now()[:10],
        "run": case.run, "part": case.part, "ledger": stamp,
    }  # fmt: skip
    rows, peers = [], {"ratio": case.reference, "over_timm": "timm"}
    for arm, reading in readings.items():
        ratios = {column: ratio(readings[peer], reading) for column, peer in peers.items() if peer in readings}
        time_s = statistics.median(reading.seconds)
        row = {"case": case.name, "arm": arm, "time_s": time_s, **ratios, "repetitions": len(reading.seconds)}
        rows.append(row | {"gmacs": reading.macs / 1e9, **about, **reading.more})
    return rows


def ratio(reference: Reading, other: Reading) -> float:
    """Median over repetitions of the reference's time over the other's in the same turn."""
    return statistics.median(a / b for a, b in zip(reference.seconds, other.seconds, strict=True))


def take_turns(
    arms: Mapping[str, Arm], device: str = "cpu", seconds: float = SECONDS_PER_ARM
) -> dict[str, list[float]]:
    """Seconds of each arm's steps, one step each in turn after a warm-up; as many turns as the slowest arm's allow."""
    wait = torch.get_device_module(device).synchronize

    def once(arm: Arm) -> float:
        given = arm.fresh()
        wait()
        began = time.perf_counter()
        arm.step(given)
        wait()
        return time.perf_counter() - began

    slowest = max(min(once(arm) for _ in range(WARM_UP)) for arm in arms.values())
    turns = min(max(round(seconds / slowest), REPEATS[0]), REPEATS[1])
    taken = [{name: once(arm) for name, arm in arms.items()} for _ in range(turns)]
    return {name: [turn[name] for turn in taken] for name in arms}


# ---------------------------------------------------------------------------------------------------- tables


def path_of(name: str, profile: Profile) -> Path:
    """The file of a benchmark's rows."""
    return paths.outputs() / profile.name / "bench" / f"{name}.csv"


def read(path: Path) -> list[dict]:
    """The stored rows, without empty cells; none where there is no file. Numbers are numbers."""
    if not path.is_file():
        return []
    with intact(path), path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
        return [{key: value if key in TEXTS else float(value) for key, value in row.items() if value} for row in rows]


def write(path: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with write_whole(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def summary(rows: Iterable[dict]) -> pd.DataFrame:
    """One row per case and arm: medians over restarts, the ratio to the arm `over` with its range over them."""
    import pandas as pd

    table, lines = pd.DataFrame(rows), []
    for (case, arm), group in table.groupby(["case", "arm"], sort=False):
        middle = group.median(numeric_only=True)
        reference = table[(table["case"] == case) & (table["ratio"] == 1)]["arm"].iloc[0]
        lines.append({
            "case": case, "arm": arm, "time_s": middle["time_s"], "ratio": middle["ratio"], "over": reference,
            "low": group["ratio"].min(), "high": group["ratio"].max(), "n": len(group),
        } | {name: middle.get(name) for name in ("over_timm", "gmacs", *MORE)})  # fmt: skip
    return pd.DataFrame(lines).dropna(axis=1, how="all")


def report(bench: Bench, profile: Profile, rows: list[dict]) -> str:
    """The table of a benchmark, and what of it was not run here."""
    devices = sorted({f"{row['device']}, {row['threads']:.0f} threads, {row['precision']}" for row in rows})
    table = summary(rows).to_markdown(index=False, tablefmt="simple", floatfmt=".3g", missingval="")
    gpu, done = torch.cuda.is_available(), {row["case"] for row in rows}
    absent = [case.name for case in bench.cases(profile, "cuda" if gpu else "cpu") if case.name not in done]
    if not gpu and (others := bench.cases(profile, "cuda")):
        absent.append(f"{len(others)} cases on a GPU (no GPU here)")
    return "\n".join([f"{bench.name} on {'; '.join(devices)}", table, *(f"not run: {what}" for what in absent)])


if __name__ == "__main__":
    print(json.dumps(measure_here(*pickle.load(sys.stdin.buffer))))
