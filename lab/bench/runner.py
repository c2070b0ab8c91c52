"""Runs a benchmark's cases, each restart in a fresh process; writes and prints the table."""

from __future__ import annotations

import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from lab import paths
from lab.bench import stopwatch
from lab.claims.ledger import Part, ledger_hashes, part_hash
from lab.runs.execute import device_name
from lab.runs.launch import MEMORY
from vitlib.errors import UsageError, unknown

BENCHES = ("branches", "finetune", "masked", "train", "data")
DEVICES = ("cpu", "cuda")
# columns that are texts, also where one looks like a number (a hash such as 5e12...)
TEXTS = ("case", "arm", "precision", "kind", "device", "torch", "date", "run", "part", "ledger")
MORE = ("saved_mb", "state_mb", "mem_mb", "peak_mb", "images_per_s")  # columns that only some benchmarks have


@dataclass(frozen=True)
class Case:
    """One comparison at one size."""

    name: str
    task: dict  # what `measure` needs, as JSON
    reference: str  # ratios are this arm's time over each other arm's
    restarts: int
    not_run: str = ""  # why it cannot run on this machine
    threads: int = 0  # 0: all cores
    part: str = ""  # the part of a claim that is judged on these rows


class Reading(NamedTuple):
    """One arm in one process."""

    seconds: list[float]  # of each repetition
    macs: int  # of a step
    bytes: int
    more: dict = {}  # noqa: RUF012  further columns


def run(name: str, profile: str, device: str = "", restarts: int = 0, only: str = "") -> list[dict]:
    """Measure what `name` compares, write outputs/<profile>/bench/<name>.csv as each case is done; all its rows.

    `restarts` replaces each case's own number; `only` picks the cases whose name contains it. Rows of other cases in an
    existing file stay. Raises UsageError for a benchmark or device that does not exist.
    """
    if name not in BENCHES:
        raise unknown("benchmark", name, BENCHES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but PyTorch finds no GPU here: allowed is cpu")
    module = importlib.import_module(f"lab.bench.{name}")
    every = module.cases(profile, device)
    chosen = [case for case in every if only in case.name and not case.not_run]
    if not chosen:
        raise UsageError(f"no case of {name} contains {only!r}: there are {'; '.join(c.name for c in every)}")
    path = path_of(name, profile)
    for case in chosen:
        rows = []
        for restart in range(restarts or case.restarts):
            print(
                f"{name}: {case.name}, restart {restart + 1} of {restarts or case.restarts}",
                file=sys.stderr,
                flush=True,
            )
            rows += [row | {"restart": restart} for row in _restart(name, case, device)]
        known = {c.name for c in every} - {case.name}  # rows of cases that exist no more go
        write(path, [row for row in read(path) if row["case"] in known] + rows)
    return read(path)


def _restart(name: str, case: Case, device: str) -> list[dict]:
    """One fresh process; its rows."""
    about = {"bench": name, "device": device, "threads": case.threads, "reference": case.reference}
    about |= {"part": case.part}
    done = subprocess.run(
        [sys.executable, "-m", "lab.bench"], input=json.dumps(about | {"task": case.task}), capture_output=True, text=True,
        env=MEMORY | os.environ,
    )  # fmt: skip
    if done.returncode:
        raise UsageError(f"the process for {case.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return [{"case": case.name} | row for row in json.loads(done.stdout.splitlines()[-1])]


def measure_here(task: dict) -> list[dict]:
    """In a restart's process: a row an arm."""
    device = task["device"]
    torch.set_num_threads(task["threads"] or len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = stopwatch.ceilings(device, dtype)
    found = importlib.import_module(f"lab.bench.{task['bench']}").measure(task["task"], device, dtype)
    top = stopwatch.Ceilings(*map(max, before, stopwatch.ceilings(device, dtype)))
    part = task["part"]
    ledger = {"part": part, "ledger": ledger_hashes()[part]} if part else {}
    rows, peers = [], {"ratio": task["reference"], "over_timm": "timm"}
    for arm, reading in found.items():
        seconds = statistics.median(reading.seconds)
        ratios = {column: _ratio(found[peer], reading) for column, peer in peers.items() if peer in found}
        rows.append({
            "arm": arm, "time_s": seconds, **ratios, "repetitions": len(reading.seconds), "gmacs": reading.macs / 1e9,
            "gbytes": reading.bytes / 1e9, "of_matmul": reading.macs / seconds / top.macs,
            "of_copy": reading.bytes / seconds / top.bytes, "precision": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "kind": device, "device": device_name(device), "torch": torch.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        } | reading.more | ledger)  # fmt: skip
    return rows


def evidence(name: str, profile: str, part: Part) -> list[dict]:
    """The rows that a part is judged on: measured under its present ledger entry, all of its restarts; else none.

    A part of scope "gpu" is judged on a GPU's rows alone.
    """
    fixed = (part.id, part_hash(part.entry(profile)))
    rows = [row for row in read(path_of(name, profile)) if (row.get("part"), row.get("ledger")) == fixed]
    if part.scope == "gpu":
        rows = [row for row in rows if row["kind"] == "cuda"]
    whole = all(sum(row["arm"] == arm for row in rows) == part.n for arm in part.contrast)
    return rows if whole else []


def path_of(name: str, profile: str) -> Path:
    """Where a benchmark's rows lie."""
    return paths.outputs() / profile / "bench" / f"{name}.csv"


def _ratio(reference: Reading, other: Reading) -> float:
    """Median over repetitions of the reference's time over the other's in the same turn: a slow phase meets both."""
    return statistics.median(a / b for a, b in zip(reference.seconds, other.seconds, strict=True))


# ---------------------------------------------------------------------------------------------------- tables


def read(path: Path) -> list[dict]:
    """The stored rows; empty where there is no file. Numbers are numbers."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: value if key in TEXTS or value == "" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def write(path: Path, rows: list[dict]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    draft.replace(path)


def summary(rows: Iterable[dict]) -> list[dict]:
    """One line a case and arm: medians over restarts, the ratio with its range over them."""
    rows = list(rows)
    lines = []
    for case, arm in dict.fromkeys((row["case"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["case"], row["arm"]) == (case, arm)]
        ratios = [row["ratio"] for row in own]

        def middle(column: str, own=own) -> float:
            return statistics.median(row[column] for row in own)

        reference = next(row["arm"] for row in rows if row["case"] == case and row["ratio"] == 1)
        more = {c: f"{middle(c):.4g}" for c in MORE if own[0].get(c)}
        lines.append({
            "case": case, "arm": arm, "time_s": f"{middle('time_s'):.4g}",
            "ratio": f"{statistics.median(ratios):.3g}", "over": reference,
            "range (n restarts)": f"{min(ratios):.3g} to {max(ratios):.3g} (n={len(own)})",
            "over timm": f"{middle('over_timm'):.3g}" if own[0].get("over_timm") else "",
            "gmacs": f"{middle('gmacs'):.3g}", "gbytes": f"{middle('gbytes'):.3g}",
            "of matmul ceiling": f"{100 * middle('of_matmul'):.0f} %", "of copy ceiling": f"{100 * middle('of_copy'):.0f} %",
        } | more)  # fmt: skip
    columns = dict.fromkeys(column for line in lines for column in line)
    lines = [{column: line.get(column, "") for column in columns} for line in lines]
    return [{c: line[c] for c in columns if any(other[c] for other in lines)} for line in lines]


def text(lines: list[dict]) -> str:
    """A plain table for the terminal."""
    columns = list(lines[0])
    wide = {c: max(len(c), *(len(str(line[c])) for line in lines)) for c in columns}
    rows = [dict(zip(columns, columns, strict=True)), {c: "-" * wide[c] for c in columns}, *lines]
    return "\n".join("  ".join(str(row[c]).ljust(wide[c]) for c in columns).rstrip() for row in rows)


def report(name: str, profile: str, rows: list[dict]) -> str:
    """The table of a benchmark, and what of it was not run here and why."""
    module = importlib.import_module(f"lab.bench.{name}")
    done = {row["case"] for row in rows}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    absent = [(c.name, c.not_run or "not asked for") for c in module.cases(profile, device) if c.name not in done]
    if device == "cpu":
        gpu = module.cases(profile, "cuda")
        absent += [(f"{len(gpu)} cases on a GPU", "no GPU here")] if gpu else []
    devices = sorted({f"{row['device']}, {row['threads']:.0f} threads, {row['precision']}" for row in rows})
    notes = [f"not run: {what} ({why})" for what, why in absent]
    return "\n".join([f"{name} on {'; '.join(devices)}", text(summary(rows)), *notes])
