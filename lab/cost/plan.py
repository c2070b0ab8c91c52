"""What a set of runs will cost, before anything starts.

CPU seconds come from finished runs that differ only in their seed, where there are any; else from a formula:

    C + steps * work * (A * pairs + B * multiply-adds of a step, forward and backward)

with A, B and C fitted to 60 runs like those of profile cpu, two at a time on a 2-core AMD EPYC machine with AVX2
(within about 15 % there). `work` is the share of a full step that a strategy does.

GPU-hours (`gpu_cost`) come from exact multiply-adds (`work.py`) and a rate, which was measured, is given, or is assumed
as a share of the maker's peak; whatever is printed says which.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lab import paths
from lab.cost import count
from lab.cost.work import Job, flop, forward_macs, held, job, on_meta, step_macs
from lab.data.cards import read_card
from lab.runs import store
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError, unknown
from vitlib.model import ViTConfig
from vitlib.train.dvae import DVAE, DVAEConfig
from vitlib.train.engine import own_parts

SECONDS_A_PAIR = 0.3e-3  # A, of one step: what a pair costs however small the batch
SECONDS_A_GMAC = 0.062  # B
SECONDS_A_RUN = 6.0  # C: data, evaluation, k-means
MB_A_WORKER = 900  # torch and timm, the data, one model
WORK = {"full": 1.0, "attn": 0.8, "ffn": 0.9, "head": 0.7}  # head: the position embedding needs the way back


@dataclass(frozen=True)
class Cost:
    """What a set of runs needs: all of it, and the part that is still missing."""

    runs: int
    missing: int
    cpu_s: float  # of the missing runs
    wall_s: float  # cpu_s over the workers
    mem_mb: int
    disk_mb: float


@functools.cache
def _params(config: ViTConfig | DVAEConfig) -> int:
    return count.params(on_meta(config))


@functools.cache
def _gmacs(config: ViTConfig | DVAEConfig) -> float:
    """Multiply-adds (G) of one image's forward pass; of a discrete VAE with hard tokens."""
    if isinstance(config, ViTConfig):
        return count.macs(config).matmul / 1e9
    with torch.device("meta"):
        return count.macs(DVAE(config)).matmul / 1e9


def formula_seconds(spec: RunSpec) -> float:
    """CPU seconds of a run by the formula above."""
    gmacs = _gmacs(spec.model)
    batch = min(spec.recipe.batch_size, spec.training_images)
    step = SECONDS_A_PAIR * spec.model.pairs + SECONDS_A_GMAC * 3 * gmacs * batch
    return SECONDS_A_RUN + spec.steps * step * WORK[spec.strategy]


@functools.cache
def _measured(store: str) -> dict[str, float]:
    """Mean CPU seconds of the finished runs in the store, by what they have in common except the seed."""
    seconds: dict[str, list[float]] = {}
    for path in paths.runs().glob("[0-9a-f]*/result.json"):
        try:
            spec = json.loads((path.parent / "spec.json").read_text(encoding="utf-8"))
            seconds.setdefault(_kind(spec), []).append(json.loads(path.read_text(encoding="utf-8"))["cpu_s"])
        except (OSError, ValueError, KeyError):
            continue
    return {kind: sum(values) / len(values) for kind, values in seconds.items()}


def _kind(record: dict) -> str:
    """A spec's record without its seed; of its parent and its tokenizer only whether there is one."""
    needs = {name: bool(record.get(name)) for name in ("parent", "tokenizer")}
    return json.dumps(record | {"seed": None} | needs, sort_keys=True)


def cpu_seconds(spec: RunSpec) -> float:
    """What this run will cost on one core."""
    measured = _measured(str(paths.runs())).get(_kind(json.loads(json.dumps(spec.record()))))
    return measured if measured is not None else formula_seconds(spec)


def cost(specs: Iterable[RunSpec], jobs: int) -> Cost:
    """The cost of these runs and their parents with `jobs` workers."""
    specs = list(specs)
    family = {member for spec in specs for member in spec.family()}
    todo = store.missing(specs)
    cpu = sum(cpu_seconds(spec) for spec in todo)
    longest = max((cpu_seconds(spec) for spec in todo), default=0.0)
    disk = sum(4 * _params(spec.model) + 20_000 for spec in todo) / 2**20
    return Cost(len(family), len(todo), cpu, max(cpu / jobs, longest), MB_A_WORKER * min(jobs, max(len(todo), 1)), disk)


# ---------------------------------------------------------------------------------------------------- the rate of a GPU

UTILISATION = 0.35  # of the peak, where nothing was measured: an assumption, and the first thing to replace by `bench`
GB = 2**30


@dataclass(frozen=True)
class Device:
    """What its maker says of a GPU."""

    tflops: float  # the peak of dense matrix products in half precision, 1e12 FLOP a second; sparsity does not count
    memory_gb: int
    half: str = "bf16"


DEVICES = {
    "v100": Device(125, 32, "fp16"),
    "a100": Device(312, 80),
    "h100": Device(989, 80),  # SXM
    "h200": Device(989, 141),
    "l40s": Device(362, 48),
    "rtx4090": Device(165, 24),  # with sums in float32
}


@dataclass(frozen=True)
class Rate:
    """What a GPU really does in training."""

    tflops: float  # 1e12 FLOP a second, a multiply-add being two
    how: str  # "measured", "given" or "assumed"
    source: str


def rates(name: str) -> list[Rate]:
    """What benchmarks measured on such a device, the largest step first; this checkout's own before the reference's.

    The full training steps of `bench finetune` and `bench train` count, forward, backward and optimizer without reading
    images; of several restarts the median. Raises UsageError for an unknown device.
    """
    _device(name)
    found: list[tuple[float, Rate]] = []
    for bench in ("finetune", "train"):
        for path in (*paths.outputs().glob(f"*/bench/{bench}.csv"), *paths.REFERENCE.glob(f"*/bench/{bench}.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if _is_step(row, name)]
            for case, arm in dict.fromkeys((row["case"], row["arm"]) for row in rows):
                own = [row for row in rows if (row["case"], row["arm"]) == (case, arm)]
                tflops = statistics.median(2e-3 * float(row["gmacs"]) / float(row["time_s"]) for row in own)
                about = f"bench {bench}, {case}, {arm}, {own[0]['device']}, {own[0]['date']}"
                found.append((float(own[0]["gmacs"]), Rate(tflops, "measured", about)))
    return [rate for _, rate in sorted(found, key=lambda pair: -pair[0])]


def _is_step(row: dict[str, str], name: str) -> bool:
    """A full training step in half precision on such a device, with its multiply-adds counted."""
    if row.get("kind") != "cuda" or row["precision"] == "float32":  # older tables have no such column, and no GPU
        return False
    full = row["arm"] == "full" or ("x" in row["arm"] and "timm" not in row["arm"])
    return full and float(row["gmacs"]) > 0 and name in row["device"].lower().replace(" ", "")


def rate_of(name: str, utilisation: float | None = None, rate: float | None = None) -> Rate:
    """The rate to plan with: `rate` (TFLOP/s) if given, else what was measured, else a share of the peak.

    `utilisation` asks for that share of the peak although something was measured; without either it is UTILISATION.
    Raises UsageError for an unknown device, a rate that is not positive and a share that is not in (0, 1].
    """
    device = _device(name)
    if rate is not None and not 0 < rate < math.inf:
        raise UsageError(f"rate is {rate!r}: allowed is a positive number of TFLOP/s that training reaches")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UsageError(f"utilisation is {utilisation!r}: allowed is a share of the peak in (0, 1]")
    if rate is not None:
        return Rate(rate, "given", "by the caller")
    measured = rates(name) if utilisation is None else []
    if measured:
        return measured[0]
    share = UTILISATION if utilisation is None else utilisation
    peak = f"{device.tflops:g} TFLOP/s, the maker's peak (dense, {device.half})"
    return Rate(share * device.tflops, "assumed", f"{100 * share:g} % of {peak}")


def _device(name: str) -> Device:
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


# ---------------------------------------------------------------------------------------------------- the plan

HEADROOM = 0.9  # of a GPU's memory: the rest is for what is not counted (an operation's own tensors, libraries, gaps)


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    kind: str
    runs: int
    images: int  # seen by one run in training
    forward_gmacs: float  # of an image
    step_gmacs: float
    hours: float  # on one GPU, of one run
    parts: int  # that a GPU's share of a batch goes through in
    mem_gb: float  # on each GPU
    fits: bool
    checkpoint_gb: float
    weights_gb: float  # what stays of a run

    @property
    def all_hours(self) -> float:
        return self.runs * self.hours


@dataclass(frozen=True)
class GPUCost:
    """The cost of a set of runs on a kind of GPU, row by row and in sum."""

    device: str
    rate: Rate
    gpus: int
    rows: tuple[Row, ...]
    data_gb: dict[str, float | None]  # by data set; None where its card does not say
    notes: tuple[str, ...]

    @property
    def hours(self) -> float:
        return sum(row.all_hours for row in self.rows)

    @property
    def mem_gb(self) -> float:
        return max((row.mem_gb for row in self.rows), default=0.0)

    @property
    def disk_gb(self) -> float:
        """Weights of all runs; the largest checkpoint twice, since a new one is whole before the old one goes; data."""
        checkpoint = max((row.checkpoint_gb for row in self.rows), default=0.0)
        kept = sum(row.runs * row.weights_gb for row in self.rows)
        return kept + 2 * checkpoint + sum(size or 0.0 for size in self.data_gb.values())


def gpu_cost(
    specs: Iterable[RunSpec | Job],
    device: str,
    utilisation: float | None = None,
    rate: float | None = None,
    gpus: int = 1,
) -> GPUCost:
    """What exactly these runs cost on `gpus` GPUs that share each run's batch; a spec given twice is one run.

    The caller chooses: `store.missing(specs)` for what is left to do, `family(specs)` for all of it, finished or not.
    `rate` in TFLOP/s and `utilisation` as in `rate_of`, which also says what is raised.
    """
    if gpus < 1:
        raise UsageError(f"gpus is {gpus!r}: allowed is a whole number from 1")
    found, given = rate_of(device, utilisation, rate), list(specs)
    jobs = [spec for spec in given if isinstance(spec, Job)]
    jobs += [job(spec) for spec in dict.fromkeys(spec for spec in given if isinstance(spec, RunSpec))]
    rows = tuple(_row(one, n, DEVICES[device], found, gpus) for one, n in Counter(jobs).items())
    data = {name: _data_gb(name) for name in dict.fromkeys(one.data for one in jobs) if name}
    return GPUCost(device, found, gpus, rows, data, (*_notes(jobs, device), *_too_large(rows, device)))


def family(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """These runs and all that they need, each once, what is needed first."""
    return list(dict.fromkeys(member for spec in specs for member in spec.family()))


def _row(job: Job, count: int, device: Device, rate: Rate, gpus: int) -> Row:
    kept, images = held(job), min(job.recipe.batch_size, job.images)
    # Whatever trains nothing but attention or the head has a stem of fixed statistics.
    batch_norm = getattr(job.model, "norm", "none") == "bn" and job.strategy == "full"
    share, parts = math.ceil(images / gpus), own_parts(job.accumulate, gpus, batch_norm)
    mem_gb = (kept.state + math.ceil(share / parts) * kept.an_image) / GB
    return Row(
        job.kind, count, job.seen, forward_macs(job) / 1e9, step_macs(job) / 1e9,
        flop(job) / (rate.tflops * 1e12) / 3600, parts, mem_gb, mem_gb <= HEADROOM * device.memory_gb,
        kept.checkpoint / GB, (kept.weights + kept.ema) / GB,
    )  # fmt: skip


def _data_gb(name: str) -> float | None:
    about = read_card(paths.DATA_CARDS / f"{name}.md").get("dataset_info", {})
    size = about.get("dataset_size") or about.get("download_size")
    return size / GB if size else None


def _notes(jobs: Sequence[Job], device: str) -> Iterable[str]:
    half, single = DEVICES[device].half, sum(one.precision == "float32" for one in jobs)
    if single:
        yield f"{single} of the runs are in float32, and the rate is that of {half}: they take longer"
    if half != "bf16" and single < len(jobs):
        yield f"{len(jobs) - single} of the runs are in bf16, which a {device} does not multiply at this rate"


def _too_large(rows: Sequence[Row], device: str) -> Iterable[str]:
    if large := [row for row in rows if not row.fits]:
        most = max(large, key=lambda row: row.mem_gb)
        yield (
            f"{sum(row.runs for row in large)} of the runs do not fit {HEADROOM:.0%} of a {device}'s "
            f"{DEVICES[device].memory_gb} GB in the parts that their specs say, above all {most.kind} with "
            f"{most.mem_gb:.1f} GB: take a larger GPU, or more that share each run"
        )


FORMULA = """\
GPU-hours = 2 x (images seen x step + images evaluated x forward) / rate / 3600, in multiply-adds of one image
  images seen = epochs x images of an epoch; step = 3 x forward (the way back is 2 x), exactly what is left where parts
  are frozen, + 1 forward with activation checkpointing, + the tokenizer's forward in masked pre-training. Counted from
  the operations, every token in every layer. Reading images is not in it: the GPU is taken never to wait for them.
memory = weights + gradients + optimizer + EMA (float32) + activations of the images at once (counted; temporary tensors
  are not), a batch in the parts that its spec says, shared by the GPUs; it fits within {headroom:.0%} of a GPU
disk = final weights of every run + twice the largest checkpoint (weights + optimizer + EMA) + data. A GB is 2^30 bytes"""


def gpu_text(cost: GPUCost) -> str:
    """The plan for the terminal: the formula, the rate and where it is from, a row for each kind of run, the sum."""
    from lab.bench.runner import text

    how, wall = cost.rate.how, cost.hours / cost.gpus
    table = [text([_line(row, how) for row in cost.rows])] if cost.rows else []
    sizes = ", ".join(
        f"{n} {_figures(gb)} GB" if gb else f"{n} (its card does not say)" for n, gb in cost.data_gb.items()
    )
    return "\n".join([
        FORMULA.format(headroom=HEADROOM),
        f"rate of {cost.device} = {cost.rate.tflops:.4g} TFLOP/s, {how}: {cost.rate.source}",
        *table,
        f"in sum: {sum(row.runs for row in cost.rows)} runs, {_figures(cost.hours)} GPU-hours ({how}), "
        f"{_figures(wall)} hours on {cost.gpus} {cost.device} ({how}), up to {cost.mem_gb:.1f} GB of memory on each, "
        f"{_figures(cost.disk_gb)} GB of disk",
        *([f"data: {sizes}"] if sizes else []),
        *(f"note: {note}" for note in cost.notes),
    ])  # fmt: skip


def _line(row: Row, how: str) -> dict[str, object]:
    return {
        "run": row.kind, "runs": row.runs, "images seen": f"{row.images:,}",
        "GMACs forward": f"{row.forward_gmacs:.4g}", "GMACs step": f"{row.step_gmacs:.4g}", f"GPU-hours each ({how})": _figures(row.hours),
        f"GPU-hours ({how})": _figures(row.all_hours), "parts": row.parts,
        "memory GB": f"{row.mem_gb:.1f}{'' if row.fits else ' (does not fit)'}", "checkpoint GB": f"{row.checkpoint_gb:.2f}",
        "weights GB": f"{row.weights_gb:.2f}",
    }  # fmt: skip


def _figures(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
