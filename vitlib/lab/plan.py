"""What a set of runs will cost, before anything starts.

CPU seconds come from finished runs that differ only in their seed, where there are any; else from a formula:

    C + steps * work * (A * pairs + B * multiply-adds of a step, forward and backward)

with A, B and C fitted to 60 runs like those of profile cpu, two at a time on a 2-core AMD EPYC machine with AVX2 (within about 15 %
there). `work` is the share of a full step that a strategy does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vitlib import paths
from vitlib.lab import measure, runs
from vitlib.lab.runs import RunSpec
from vitlib.model import ViT, ViTConfig
from vitlib.train.dvae import DVAE, DVAEConfig

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
def _model_facts(config: ViTConfig | DVAEConfig) -> tuple[int, float]:
    """Parameters and multiply-adds (G) of one image's forward pass."""
    with torch.device("meta"):
        model = ViT(config) if isinstance(config, ViTConfig) else DVAE(config)
    return measure.params(model), measure.macs(model)[0] / 1e9


def formula_seconds(spec: RunSpec) -> float:
    """CPU seconds of a run by the formula above."""
    _, gmacs = _model_facts(spec.model)
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
    todo = runs.missing(specs)
    cpu = sum(cpu_seconds(spec) for spec in todo)
    longest = max((cpu_seconds(spec) for spec in todo), default=0.0)
    disk = sum(4 * _model_facts(spec.model)[0] + 20_000 for spec in todo) / 2**20
    return Cost(len(family), len(todo), cpu, max(cpu / jobs, longest), MB_A_WORKER * min(jobs, max(len(todo), 1)), disk)
