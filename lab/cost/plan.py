"""What a set of runs will take, before anything starts.

CPU seconds are those of finished runs that differ in their seed alone, where there are any; else

    C + steps * (A * pairs + B * multiply-adds of a step, forward and backward)

with A, B and C fitted to 60 runs like those of profile cpu, two at a time on a 2-core AMD EPYC machine with AVX2
(within about 15 % there). GPU-hours come from the same exact multiply-adds (`count.training_macs`) and a rate, which was
measured, is given, or is assumed as a share of the maker's peak; whatever is printed says which.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lab import paths
from lab.cost import count
from lab.runs import store
from lab.runs.processes import cores
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.files import intact
from vitlib.tasks.plan import DEVICES
from vitlib.train.engine import own_parts

if TYPE_CHECKING:
    import pandas as pd

SECONDS_PER_PAIR = 0.3e-3  # A, of one step: what a pair costs however small the batch
SECONDS_PER_GMAC = 0.062  # B
SECONDS_PER_RUN = 6.0  # C: data, evaluation, k-means
MB_PER_WORKER = 1200  # torch and timm, one model, its steps: the most that a run of the study has taken
SPANS = {"years": 365.25 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
GB = 2**30


def span(seconds: float) -> str:
    """A time in words: "12 minutes", "2.6 days", "2,600 years"."""
    unit, length = next((unit, length) for unit, length in SPANS.items() if seconds >= 2 * length or unit == "seconds")
    number = seconds / length
    return f"{number:.2g} {unit}" if number < 10 else f"{float(f'{number:.2g}'):,.0f} {unit}"


def family(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """These runs and all that they need, each once, what is needed first."""
    return list(dict.fromkeys(member for spec in specs for member in spec.family()))


# ---------------------------------------------------------------------------------------------------- CPU


class Cost(NamedTuple):
    """What a set of runs needs: all of it, and the part that is still missing."""

    runs: int
    missing: int
    cpu_s: float  # of the missing runs
    wall_s: float  # cpu_s over the workers
    mem_mb: int
    disk_mb: float


def formula_seconds(spec: RunSpec) -> float:
    """CPU seconds of a run by the formula above."""
    images = min(spec.recipe.batch_size, spec.training_images)
    step = SECONDS_PER_PAIR * spec.model.pairs + SECONDS_PER_GMAC * 1e-9 * count.training_macs(spec) * images
    return SECONDS_PER_RUN + spec.steps * step


@functools.cache
def _measured(folder: str) -> dict[str, float]:
    """Mean CPU seconds of the finished runs in the store, by what they have in common except the seed."""
    seconds = defaultdict(list)
    for run in store.folders():
        with suppress(UsageError):  # not this version's, or damaged: `store.find` says so where it is wanted
            record, result = store.read(run)
            seconds[_kind(record)].append(result.about["cpu_s"])
    return {kind: statistics.mean(values) for kind, values in seconds.items()}


def _kind(record: dict) -> str:
    """A spec's record without its seed; of its parent and its tokenizer only whether there is one."""
    needs = {name: bool(record.get(name)) for name in ("parent", "tokenizer")}
    return json.dumps(record | {"seed": None} | needs, sort_keys=True)


def cpu_seconds(spec: RunSpec) -> float:
    """What this run will take on one core."""
    return _measured(str(paths.runs())).get(_kind(spec.record())) or formula_seconds(spec)


def cost(specs: Iterable[RunSpec], jobs: int) -> Cost:
    """The cost of these runs and of those that they need with `jobs` workers."""
    specs = list(specs)
    todo = store.missing(specs)
    seconds = [cpu_seconds(spec) for spec in todo]
    disk = sum(count.run_state(spec).weights + 20_000 for spec in todo) / 2**20
    wall = max(sum(seconds) / jobs, *seconds, 0.0)
    memory = (MB_PER_WORKER + round(max(map(_images_mb, todo), default=0))) * min(jobs, max(len(todo), 1))
    return Cost(len(family(specs)), len(todo), sum(seconds), wall, memory, disk)


def _images_mb(spec: RunSpec) -> float:
    """What a process keeps of the images, as they are and resized, and a third of it more while it decodes and resizes.

    Those of many sizes are read anew in each epoch.
    """
    sides = spec.facts.image_size, spec.model.image_size
    pixels = sum(side**2 for side in dict.fromkeys(sides)) if all(sides) else 0
    return 4 / 3 * sum(spec.facts.sizes.values()) * spec.facts.channels * pixels / 2**20


def cpu_text(specs: Sequence[RunSpec], jobs: int = 0) -> str:
    """What these runs cost on this machine, in one paragraph for the terminal."""
    workers = jobs or cores()
    c = cost(specs, workers)
    text = f"{c.runs} runs, {c.missing} of them to train: about {span(c.cpu_s)} of one CPU core"
    if c.cpu_s > SPANS["years"] and any(spec.device != "cpu" for spec in specs):
        return f"{text}. They are meant for a GPU: --device says how long it takes ({', '.join(DEVICES)})"
    return f"{text}, {span(c.wall_s)} with {workers} workers, {c.mem_mb:,} MB of memory, {c.disk_mb:,.0f} MB of disk"


# ---------------------------------------------------------------------------------------------------- GPU

UTILISATION = 0.35  # of the peak, where nothing was measured: an assumption, and the first thing to replace by `bench`
HEADROOM = 0.9  # of a GPU's memory: the rest is for what is not counted (an operation's own tensors, libraries, gaps)
FORMULA = f"""\
GPU-hours = 2 x (images seen x step + images evaluated x forward) / rate / 3600, in multiply-adds per image; a step is 3 x
  forward, exactly what is left where parts are frozen, and the tokenizer's forward in masked pre-training. Reading images
  is not in it: the GPU is taken never to wait for them. The rate is that of half precision: runs in float32 take longer.
memory = weights + gradients + optimizer + EMA (float32) + activations of the images at once (counted; temporary tensors
  are not); it fits within {HEADROOM:.0%} of a GPU. A GB is 2^30 bytes."""


class Rate(NamedTuple):
    """What a GPU really does in training."""

    tflops: float  # 1e12 FLOP per second, a multiply-add being two
    how: str  # "measured", "given" or "assumed"
    source: str


def measured_rate(device: str) -> Rate | None:
    """That of the largest full training step which `bench finetune` timed on such a device, reading images apart.

    The median over process restarts; of equal steps this checkout's before the reference's.
    """
    steps, name = defaultdict(list), re.sub(r"(\d+)", r" ?\1", device)  # "GeForce RTX 4090"
    for path in [path for at in (paths.outputs(), paths.REFERENCE) for path in at.glob("*/bench/finetune.csv")]:
        with intact(path), path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if re.search(rf"\b{name}\b", row["device"], re.I) and (row["arm"], row.get("kind")) == ("full", "cuda"):
                    steps[path, row["case"]].append(row)
    if not steps:
        return None
    rows = max(steps.values(), key=lambda rows: float(rows[0]["gmacs"]))
    rate = statistics.median(2e-3 * float(row["gmacs"]) / float(row["time_s"]) for row in rows)
    return Rate(rate, "measured", "bench finetune, {case}, {device}, {date}".format_map(rows[0]))


def rate_of(device: str, rate: float | None = None) -> Rate:
    """The rate to plan with: `rate` (TFLOP/s) if given, else what was measured, else a share of the maker's peak.

    Raises UsageError for an unknown device and a rate that is not positive.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if rate is not None:
        if not 0 < rate < math.inf:
            raise UsageError(f"rate is {rate!r}: allowed is a positive number of TFLOP/s that training reaches")
        return Rate(rate, "given", "by the caller")
    peak = DEVICES[device].tflops
    source = f"{100 * UTILISATION:g} % of {peak:g} TFLOP/s, the maker's peak (dense, half precision)"
    return measured_rate(device) or Rate(UTILISATION * peak, "assumed", source)


def gpu_hours(spec: RunSpec, rate: Rate) -> float:
    """Of the training and one evaluation of the last weights (with EMA, of both)."""
    sizes = spec.facts.sizes
    evaluated = 0 if spec.targets != "none" else sizes.get(spec.split, sizes["test"])
    evaluated *= 1 if spec.recipe.ema is None else 2
    seen = spec.recipe.epochs * spec.training_images
    return 2 * (seen * count.training_macs(spec) + evaluated * count.forward_macs(spec)) / (rate.tflops * 1e12) / 3600


def images_at_once(spec: RunSpec, gpus: int = 1) -> int:
    """Of a batch, in the parts that the spec says, on each of the GPUs that share it."""
    share = math.ceil(min(spec.recipe.batch_size, spec.training_images) / gpus)
    # Whatever trains nothing but attention or the head has a stem of fixed statistics.
    batch_norm = getattr(spec.model, "norm", "none") == "bn" and spec.strategy == "full"
    return math.ceil(share / own_parts(spec.accumulate, gpus, batch_norm))


def gpu_plan(specs: Iterable[RunSpec], rate: Rate, gpus: int = 1) -> pd.DataFrame:
    """What exactly these runs need on GPUs of which `gpus` share each run's batch, a row for each kind of run.

    Columns: kind, runs, hours (GPU-hours of all of them), memory_gb (of the largest, on each GPU), disk_gb (of the weights
    of all of them). A spec given twice is one run.
    """
    import pandas as pd

    rows = [
        (f"{spec.protocol} {spec.strategy}" if spec.parent or spec.weights else spec.protocol, gpu_hours(spec, rate),
         count.run_memory(spec, images_at_once(spec, gpus)).total / GB, count.run_state(spec).weights / GB)
        for spec in dict.fromkeys(specs)
    ]  # fmt: skip
    kinds = pd.DataFrame(rows, columns=["kind", "hours", "memory_gb", "disk_gb"]).groupby("kind", sort=False)
    sums = {name: (name, "sum") for name in ("hours", "disk_gb")}
    return kinds.agg(runs=("hours", "size"), memory_gb=("memory_gb", "max"), **sums).reset_index()


def gpu_text(specs: Iterable[RunSpec], device: str, rate: float | None = None, gpus: int = 1) -> str:
    """The plan for the terminal: the sum, a row per kind of run, the rate and where it is from, the formula.

    `rate` (TFLOP/s) and errors as in `rate_of`.
    """
    speed = rate_of(device, rate)
    plan = gpu_plan(specs, speed, gpus)
    hours, fits = plan["hours"].sum(), plan["memory_gb"] <= HEADROOM * DEVICES[device].memory_gb
    table = plan[["kind", "runs", "hours", "memory_gb"]].assign(fits=fits.map({True: "yes", False: "no"}))
    headers = ["kind of run", "runs", f"GPU-hours ({speed.how})", "memory on a GPU, GB", "fits"]
    return "\n\n".join([
        f"{plan['runs'].sum()} runs: {hours:,.0f} GPU-hours, {span(3600 * hours / gpus)} on {gpus} {device} ({speed.how}), "
        f"{plan['disk_gb'].sum():,.1f} GB for their weights",
        table.to_markdown(index=False, headers=headers, tablefmt="simple", floatfmt=("", "", ",.2f", ".1f", "")),
        f"rate of a {device}: {speed.tflops:.4g} TFLOP/s, {speed.how}: {speed.source}",
        FORMULA,
    ])  # fmt: skip
