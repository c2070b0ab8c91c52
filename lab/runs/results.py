"""Results of finished runs, and archives of them. Needs numpy and json alone: no torch, no specs of this version.

The accuracy of an arm of the pilot at its first seed:

    Archive("outputs/reference/pilot").results("31")["12x1+LS"][0].metrics["top1"]
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitlib.errors import UsageError

# What JSON that is damaged, of another form or nested without end raises when it is read.
FAULTS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
# What every result says of its surroundings besides its numbers.
ABOUT = ("split", "wall_s", "cpu_s", "mem_mb", "device", "torch", "python", "commit", "date")
NUMBERS = ("wall_s", "cpu_s", "mem_mb")  # of these


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
        named = {"hash": self.hash, "metrics": self.metrics, "ledger": self.ledger}
        return named | {"correct": _packed(self.correct)} | more | self.about

    @classmethod
    def from_record(cls, record: dict) -> Result:
        """Raises one of FAULTS for a record that is not whole or contradicts itself."""
        about = dict(record)
        named = {name: about.pop(name) for name in ("hash", "metrics", "ledger")}
        packed = about.pop("correct"), about.pop("correct_v2", None)
        numbers = [*named["metrics"].values(), *(about[name] for name in NUMBERS)]
        texts = [named["hash"], *(about[name] for name in ABOUT if name not in NUMBERS), *named["ledger"].values()]
        texts += [text for name in ("files", "sha256") for text in about.get(name, {}).values()]
        finite = all(type(n) in (int, float) and abs(n) <= sys.float_info.max for n in numbers)
        if not (finite and all(isinstance(text, str) for text in texts)):
            raise TypeError("a number or a text is of another type, or not finite")
        if ("top1" in named["metrics"]) != (packed[0] is not None):
            raise ValueError("an accuracy without its bits")
        correct, correct_v2 = map(_unpacked, packed, (named["metrics"],) * 2, ("top1", "top1_v2"))
        return cls(correct=correct, about=about, correct_v2=correct_v2, **named)


def _packed(correct: np.ndarray | None) -> dict | None:
    """Which images were right, one bit each."""
    if correct is None:
        return None
    return {"images": len(correct), "bits": base64.b64encode(np.packbits(correct).tobytes()).decode()}


def _unpacked(packed: dict | None, metrics: dict[str, float], name: str) -> np.ndarray | None:
    """Bool (images,). Raises ValueError where the bits contradict the accuracy of that name."""
    if packed is None:
        return None
    bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
    if len(bits) != -(-packed["images"] // 8):
        raise ValueError(f"{len(bits)} bytes of bits for {packed['images']} images")
    correct = np.unpackbits(bits, count=packed["images"]).astype(bool)
    if not np.isclose(100 * correct.mean(), metrics[name]):
        raise ValueError(f"{name} is not what the bits say")
    return correct


def parsed(run: dict) -> tuple[dict, Result]:
    """What was trained (the record of a spec) and the result. Raises one of FAULTS, also where they are of two runs."""
    record, result = dict(run["spec"]), Result.from_record(run["result"])
    if (name := hash_of(record)) != result.hash:
        raise ValueError(f"it says {result.hash!r}, but its spec is {name}")
    return record, result


def read_runs(path: str | Path) -> Iterator[tuple[dict, Result]]:
    """Each run of a `runs.jsonl`, as `parsed`. Raises UsageError for a line that is not a run."""
    path, seen = Path(path), {}
    if not path.is_file():
        raise UsageError(f"there is no file {path} to read: a runs.jsonl is what `export` writes")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record, result = parsed(json.loads(line))
            if seen.setdefault(result.hash, number) != number:
                raise ValueError(f"line {seen[result.hash]} has the same one")
            yield record, result
        except FAULTS as fault:
            raise UsageError(f"line {number} of {path.name} is not a run ({type(fault).__name__}: {fault})") from fault


def hash_of(record: dict) -> str:
    """The name of a run: 16 hexadecimal digits over the record of its spec."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


class Archive:
    """A study that was written down: `runs.jsonl`, and `arms.csv` (notebook, arm, seed, run) for which run is whose.

    Runs are named by the hashes that they had when they were trained, so that a study stays readable when TRAINING_VERSION
    has risen since.
    """

    def __init__(self, folder: str | Path):
        """Raises UsageError for files that are absent or damaged, and for an arm that lacks a run or a seed."""
        self.folder = Path(folder)
        self._runs = {result.hash: (record, result) for record, result in read_runs(self.folder / "runs.jsonl")}
        self._arms: dict[tuple[str, str], dict[int, str]] = {}  # (notebook, arm) -> seed -> hash
        table = self.folder / "arms.csv"
        try:
            with table.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    seed, runs = int(row["seed"]), self._arms.setdefault((row["notebook"], row["arm"]), {})
                    if runs.setdefault(seed, row["run"]) != row["run"]:
                        raise ValueError(f"arm {row['arm']!r} has two runs of seed {seed}")
        except (OSError, csv.Error, *FAULTS) as fault:
            raise UsageError(f"{table} is no table of arms ({type(fault).__name__}: {fault})") from fault
        if self._runs and not self._arms:
            raise UsageError(f"{table} names no arm: it is written with the {len(self._runs)} runs beside it")
        self.seeds = tuple(sorted({seed for by_seed in self._arms.values() for seed in by_seed}))
        for (notebook, arm), by_seed in self._arms.items():  # an arm may have fewer seeds than others, the first ones
            first = self.seeds[: len(by_seed)]
            if lost := [seed for seed in first if by_seed.get(seed) not in self._runs]:
                raise UsageError(f"{self.folder} has no run of arm {arm!r} of notebook {notebook} at seed {lost[0]}")

    @property
    def notebooks(self) -> list[str]:
        return list(dict.fromkeys(notebook for notebook, _ in self._arms))

    def results(self, notebook: str) -> dict[str, list[Result]]:
        """The results of each arm, in the order of its seeds; no arms for a notebook that trains nothing."""
        arms = {arm: by_seed for (of, arm), by_seed in self._arms.items() if of == notebook}
        return {arm: [self._runs[by_seed[seed]][1] for seed in sorted(by_seed)] for arm, by_seed in arms.items()}

    def record(self, name: str) -> dict:
        """What was trained under this hash: the fields of its spec, parents and tokenizers by their hashes."""
        return self._runs[name][0]

    def family(self, name: str) -> list[Result]:
        """The results of the runs whose weights this one began with (those that are here), then its own."""
        record = self.record(name)
        needs = [record[kind] for kind in ("tokenizer", "parent") if record.get(kind) in self._runs]
        return [*(result for need in needs for result in self.family(need)), self._runs[name][1]]
