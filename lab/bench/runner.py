"""Runs a benchmark: each restart in a fresh process, in which the arms take turns; writes and prints the table.

A case is one comparison at one size. A slow phase of the machine meets all arms of a process alike, so that ratios are
steadier than times; the process restart is the unit of statistics. Beside each time are the operations and bytes of the
step, counted, and their share of what this device reaches in a large matrix product and a large copy. Results go to
outputs/<profile>/bench/<name>.csv, one row per restart and arm, as each case is done.

Measuring needs torch and timm alone; printing needs pandas.
"""

from __future__ import annotations

import csv
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from lab import paths
from lab.cost.count import AttentionAs
from lab.experiments.profiles import Profile
from lab.runs.execute import cores, device_name
from lab.runs.launch import MEMORY
from vitlib.errors import UsageError, unknown
from vitlib.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

DEVICES = ("cpu", "cuda")
SECONDS_PER_ARM = 4.0  # timed steps of the slowest arm in one process, about
REPEATS = (3, 30)  # at least, at most
WARM_UP = 2
# columns that are texts, also where one looks like a number (a hash such as 5e12...)
TEXTS = ("case", "arm", "precision", "kind", "device", "torch", "date", "run", "part", "ledger")
MORE = ("saved_mb", "state_mb", "mem_mb", "peak_mb", "images_per_s")  # columns that only some benchmarks have


@dataclass(frozen=True)
class Case:
    """One comparison at one size."""

    name: str
    measure: str  # "module:function", called in a fresh process with (task, device, dtype): {arm: Reading}
    task: dict  # what `measure` needs, as JSON
    reference: str  # ratios are this arm's time over each other arm's
    restarts: int
    not_run: str = ""  # why it cannot run on this machine
    threads: int = 0  # 0: all cores
    part: str = ""  # the part of a claim that is judged on these rows
    run: str = ""  # hash of the run whose step is timed


class Bench(NamedTuple):
    """What a benchmark compares on a device ("cpu" or "cuda") at a profile."""

    name: str
    cases: Callable[[Profile, str], list[Case]]


class Reading(NamedTuple):
    """One arm in one process."""

    seconds: list[float]  # of each repetition
    macs: int  # of a step
    bytes: int
    more: dict = {}  # noqa: RUF012  further columns


# ---------------------------------------------------------------------------------------------------- a benchmark


def run(
    bench: Bench, profile: Profile, device: str = "", restarts: int = 0, only: str = "", stamps: Mapping[str, str] = {},
) -> list[dict]:  # fmt: skip
    """Measure, and write outputs/<profile>/bench/<name>.csv as each case is done; all its rows.

    `restarts` replaces each case's number; `only` picks the cases whose name contains it; `stamps` are the hashes of the
    ledger's entries by part, written beside the times that a part is judged on. Rows of other cases in an existing file
    stay. Raises UsageError for fewer than 0 restarts, a device that is not there, and a text that no case contains.
    """
    if restarts < 0:
        raise UsageError(f"restarts is {restarts}: allowed are 0 (each case's own number) and up")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but PyTorch finds no GPU here: allowed is cpu")
    every, path = bench.cases(profile, device), path_of(bench.name, profile)
    chosen = [case for case in every if only in case.name and not case.not_run]
    if not chosen:
        raise UsageError(f"no case of {bench.name} contains {only!r}: there are {'; '.join(c.name for c in every)}")
    for case in chosen:
        rows, count = [], restarts or case.restarts
        for restart in range(count):
            print(f"{bench.name}: {case.name}, restart {restart + 1} of {count}", file=sys.stderr, flush=True)
            rows += [row | {"restart": restart} for row in restarted(case, device, stamps)]
        known = {c.name for c in every} - {case.name}  # rows of cases that exist no more go
        write(path, [row for row in read(path) if row["case"] in known] + rows)
    return read(path)


def restarted(case: Case, device: str, stamps: Mapping[str, str] = {}) -> list[dict]:
    """The rows of one fresh process, one per arm."""
    columns = {"run": case.run, "part": case.part, "ledger": stamps.get(case.part, "")}
    order = asdict(case) | {"device": device, "columns": {name: text for name, text in columns.items() if text}}
    done = subprocess.run(
        [sys.executable, "-m", "lab.bench.runner"], input=json.dumps(order), capture_output=True, text=True,
        env=MEMORY | os.environ,
    )  # fmt: skip
    if done.returncode:
        raise UsageError(f"the process for {case.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(order: dict) -> list[dict]:
    """In the process of a restart: its rows."""
    device = order["device"]
    torch.set_num_threads(order["threads"] or cores())
    torch.set_flush_denormal(True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = ceilings(device, dtype)
    readings = pkgutil.resolve_name(order["measure"])(order["task"], device, dtype)
    top = Ceilings(*map(max, before, ceilings(device, dtype)))
    about = {
        "precision": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "kind": device,
        "device": device_name(device), "torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip
    rows, peers = [], {"ratio": order["reference"], "over_timm": "timm"}
    for arm, reading in readings.items():
        seconds = statistics.median(reading.seconds)
        ratios = {column: ratio(readings[peer], reading) for column, peer in peers.items() if peer in readings}
        rows.append({
            "case": order["name"], "arm": arm, "time_s": seconds, **ratios, "repetitions": len(reading.seconds),
            "gmacs": reading.macs / 1e9, "gbytes": reading.bytes / 1e9, "of_matmul": reading.macs / seconds / top.macs,
            "of_copy": reading.bytes / seconds / top.bytes, **about, **reading.more, **order["columns"],
        })  # fmt: skip
    return rows


def ratio(reference: Reading, other: Reading) -> float:
    """Median over repetitions of the reference's time over the other's in the same turn."""
    return statistics.median(a / b for a, b in zip(reference.seconds, other.seconds, strict=True))


# ---------------------------------------------------------------------------------------------------- a measurement


@dataclass(frozen=True)
class Arm:
    """One way to do a step. `fresh()` makes an input, untimed; `step(input)` is timed."""

    fresh: Callable[[], object]
    step: Callable[[object], object]


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


class Ceilings(NamedTuple):
    """What this device reaches: multiply-adds and bytes per second."""

    macs: float
    bytes: float


def ceilings(device: str, dtype: torch.dtype = torch.float32) -> Ceilings:
    """A large square matrix product and a large copy (read and written), best of ten."""
    side, length = (8192, 2**28) if device == "cuda" else (1536, 2**25)
    a, b = torch.randn(side, side, device=device, dtype=dtype), torch.randn(length, device=device)
    c = torch.empty_like(b)
    arms = {"matmul": Arm(lambda: None, lambda _: a @ a), "copy": Arm(lambda: None, lambda _: c.copy_(b))}
    best = {name: min(seconds) for name, seconds in take_turns(arms, device, seconds=0.5).items()}
    return Ceilings(side**3 / best["matmul"], 2 * b.nbytes / best["copy"])


class Counts(NamedTuple):
    """Of one step: multiply-adds of matrix products, convolutions and attention; bytes read and written."""

    macs: int
    bytes: int


def counted(step: Callable[[], object], on_meta: bool = False) -> Counts:
    """Run `step` once and count what reaches the device, forward and backward; on the meta device without computing.

    Bytes: each operation reads its inputs and writes its outputs, views are free. An upper bound of the traffic:
    caches keep some of it away from memory.
    """
    traffic = Traffic()
    with AttentionAs("fused") if on_meta else nullcontext(), traffic:
        step()
    return Counts(traffic.flops // 2, traffic.bytes)


class Traffic(TorchDispatchMode):
    """FLOPs, and bytes read and written. (FlopCounterMode has hooks on all modules, with which `par` runs as `seq`.)"""

    flops = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if products := PRODUCTS.get(func.overloadpacket):
            self.flops += products(*args, **(kwargs or {}), out_val=out)
        aliases = [r.alias_info for r in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # not a view
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, Tensor):
                    self.bytes += min(leaf.numel() * leaf.itemsize, leaf.untyped_storage().nbytes())
        return out


def _attention(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# PyTorch counts its GPU kernels for attention; these are the CPU's.
PRODUCTS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}


# ---------------------------------------------------------------------------------------------------- tables


def path_of(name: str, profile: Profile) -> Path:
    """The file of a benchmark's rows."""
    return paths.outputs() / profile.name / "bench" / f"{name}.csv"


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
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with write_whole(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
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
        } | {name: middle.get(name) for name in ("over_timm", "gmacs", "gbytes", "of_matmul", "of_copy", *MORE)})  # fmt: skip
    return pd.DataFrame(lines).replace("", None).dropna(axis=1, how="all")


def report(bench: Bench, profile: Profile, rows: list[dict]) -> str:
    """The table of a benchmark, and what of it was not run here and why."""
    done = {row["case"] for row in rows}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    absent = [(c.name, c.not_run or "not asked for") for c in bench.cases(profile, device) if c.name not in done]
    if device == "cpu" and (gpu := bench.cases(profile, "cuda")):
        absent.append((f"{len(gpu)} cases on a GPU", "no GPU here"))
    devices = sorted({f"{row['device']}, {row['threads']:.0f} threads, {row['precision']}" for row in rows})
    table = summary(rows).to_markdown(index=False, tablefmt="simple", floatfmt=".3g", missingval="")
    notes = [f"not run: {what} ({why})" for what, why in absent]
    return "\n".join([f"{bench.name} on {'; '.join(devices)}", table, *notes])


if __name__ == "__main__":
    print(json.dumps(measure_here(json.load(sys.stdin))))
