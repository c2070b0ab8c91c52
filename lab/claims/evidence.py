"""Where verdicts are read from: the run store at a profile, or the archive of a study. Also which runs a verdict needs.

An archive is read without torch, so that the verdicts of a study can be recomputed on any machine.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lab import paths
from lab.claims import judge
from lab.claims.judge import Verdict
from lab.claims.ledger import COMMITTED, PILOT, Ledger, Part, ledger, record_hash
from lab.claims.statistics import flat_part, middle
from lab.data import DataAbsent
from lab.experiments.profiles import PROFILES
from lab.runs.results import Archive, Result
from vitlib.errors import UsageError
from vitlib.files import intact
from vitlib.stats import Estimate, difference, over_seeds

if TYPE_CHECKING:  # both need torch
    from lab.experiments.catalogue import Notebook
    from lab.experiments.profiles import Profile
    from lab.runs.spec import RunSpec

NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Evidence:
    """A finished run, and what its verdict depends on: what was trained, and the runs that it began with."""

    result: Result
    seed: int
    record: str  # `ledger.record_hash` of its family
    family: Sequence[Result]
    data: str = ""  # checksum of its images


def _evidence(family: Sequence[Result], records: Sequence[Mapping[str, object]]) -> Evidence:
    """family, records: results of a run and of what it began with, and what was trained; its own last."""
    return Evidence(family[-1], records[-1]["seed"], record_hash(records), family, records[-1]["data_checksum"])


def verdicts(source: Stored | Archived, reference: Archived | None = None, number: str = "") -> list[Verdict]:
    """The verdict on every part of the ledger; nothing is trained. At `cpu` beside the reference's.

    number: of a notebook; what others count is left out then.
    """
    parts = [part for part in source.ledger.shown(source.name) if part.kind != "exact" or number in ("", part.notebook)]
    found = judge.corrected([verdict(source, part) for part in parts])
    if source.name != "cpu":
        return found
    theirs = {v.part.id: v for v in verdicts(reference)} if reference else {}
    return [judge.replicated(v, theirs.get(v.part.id)) for v in found]


def verdict(source: Stored | Archived, part: Part) -> Verdict:
    """The verdict on one part, before Holm's correction."""
    here, name = part.at_profile(source.name), source.name
    blank = Verdict(here, name, judge.NOT_RUN)
    if part.kind == "exact":
        return replace(blank, label=judge.EXACT if source.holds(part) else judge.FAILS)
    if name == "smoke":
        return replace(blank, label=judge.SMOKE)
    first = name == "study" and PILOT in part.n
    if name in part.n:
        try:
            found = _measured(source, part, here, blank)
        except DataAbsent as fault:
            found = replace(blank, note=str(fault))
        # Until the second study has runs of it, what the first one measured stands here, marked as its own. Runs that are
        # too few, or were made under another ledger, are not replaced by it.
        if not first or found.estimate is not None or any(source.runs(part.notebook, arm) for arm in here.arms):
            return found
    return pilot(part) if first else replace(blank, note=_elsewhere(part))


def _measured(source: Stored | Archived, part: Part, here: Part, blank: Verdict) -> Verdict:
    """The verdict on a part of this profile, or why there is none."""
    name = source.name
    if part.kind == "ratio":
        if timed := source.ratio(part):
            return judge.ratio(here, name, *timed)
        return replace(blank, note=NEEDS_GPU if part.device == "cuda" else "")
    recipes = {arm: source.ledger.recipe(part, name, arm) for arm in here.arms}
    n = {arm: part.n[name] if arm in here.contrast else min(part.n[name], recipes[arm]["n"]) for arm in recipes}
    found = {arm: source.runs(part.notebook, arm)[: n[arm]] for arm in recipes}
    for arm, runs in found.items():
        if said := _fault(source, part, arm, runs, n[arm]):
            return replace(blank, note=said)
    sizes = {np.size(run.result.correct) for runs in found.values() for run in runs}  # 1 where there are no bits
    if len(sizes) > 1 or 1 in sizes:
        return replace(blank, note="its runs say of different numbers of images whether they are right")
    correct = {arm: np.stack([run.result.correct for run in runs]) for arm, runs in found.items()}
    inside = {arm: bracketed(of_arm["rates"], source.tried) for arm, of_arm in recipes.items() if of_arm["rates"]}
    judged = judge.judge(here, name, correct, recipes[next(iter(here.contrast))]["classes"], inside)
    return replace(judged, runs=tuple(sorted(run.result.hash for runs in found.values() for run in runs)))


def _fault(source: Stored | Archived, part: Part, arm: str, runs: Sequence[Evidence], n: int) -> str:
    """Why these are not the n runs of an arm that the ledger as it is now asks for, or ""."""
    name = source.name
    if len(runs) < n:
        return f"{len(runs)} of {n} seeds of {arm}"
    if [run.seed for run in runs] != [*PROFILES[name].seeds[:n]]:
        return f"the runs of {arm} are not of the seeds of profile {name}"
    if any(run.record != source.ledger.recipe(part, name, arm)["record"] for run in runs):
        return f"{arm} was trained by another recipe than the ledger's"
    members, entry = [member for run in runs for member in run.family], source.ledger.hash(part, name)
    if any(member.ledger.get(part.id) != entry for member in members):
        return f"the runs of {arm} were not made under this entry of the ledger"
    if name in COMMITTED and any(str(member.about["commit"]).endswith("+") for member in members):
        return f"runs of {arm} were made from a tree with uncommitted changes"
    return ""


def _elsewhere(part: Part) -> str:
    places = " and ".join(name for name in part.n if name != PILOT)
    return NEEDS_GPU if part.device == "cuda" else f"measured at profile {places}"


def pilot(part: Part) -> Verdict:
    """The first study's estimate under today's labels: its rules were others, and it decides nothing."""
    here, archive = part.at_profile(PILOT), committed(PILOT).archive
    with intact(archive.folder):
        there = archive.results(part.notebook)
        correct = {arm: np.stack([r.correct for r in there[arm]]) for arm in here.contrast}
        first = archive.record(there[next(iter(here.contrast))][0].hash)
        inside = {arm: held for arm, held in _inside_of_three().items() if arm in here.contrast}
    judged = judge.judge(replace(here, checks=()), PILOT, correct, first["model"]["num_classes"], inside)
    names = tuple(sorted(r.hash for arm in here.contrast for r in there[arm]))
    return replace(judged, profile="study", source=PILOT, note="of the pilot", runs=names)


@functools.cache
def _inside_of_three() -> dict[str, bool]:
    """Arm of the pilot -> whether the middle one of its three rates was the best, where it was tuned."""
    tuned = pd.read_csv(paths.REFERENCE / PILOT / "tuning.csv").sort_values("lr").groupby("arm", sort=False)
    return {arm: rows["top1_validation"].to_numpy().argmax() not in (0, len(rows) - 1) for arm, rows in tuned}


# ---------------------------------------------------------------------------------------------------- tuning


def tried(folder: Path) -> dict[str, dict[float, dict[int, float]]]:
    """The curves that learning rates were chosen from: name -> rate -> seed -> validation top-1, as a study committed them."""
    path, found = folder / "tuning.csv", {}
    with intact(path):
        for row in pd.read_csv(path).to_dict("records") if path.is_file() else ():
            seeds = {int(key.removeprefix("seed_")): row[key] for key in row if key.startswith("seed_")}
            tops = {seed: float(value) for seed, value in seeds.items() if not pd.isna(value)}
            found.setdefault(row["rate_of"], {})[float(row["lr"])] = tops
    return found


def bracketed(rates: Mapping[str, float], curves: Mapping[str, Mapping[float, Mapping[int, float]]]) -> bool:
    """Whether each rate is the middle of the flat part of its curve, and a rate was tried on each side of that."""

    def holds(name: str, lr: float) -> bool:
        if not (curve := curves.get(name)):
            return False
        flat = flat_part(curve)
        return math.isclose(middle(flat), lr) and min(curve) < flat[0] and flat[-1] < max(curve)

    return all(holds(name, lr) for name, lr in rates.items())


# ---------------------------------------------------------------------------------------------------- the run store


@dataclass(frozen=True)
class Stored:
    """What the run store and the benchmarks of this checkout have at a profile."""

    profile: Profile
    ledger: Ledger = field(default_factory=ledger)
    _runs: dict[tuple[str, str], list[Evidence]] = field(default_factory=dict, repr=False)
    _files: dict[RunSpec, Mapping[str, str]] = field(default_factory=dict, repr=False)  # that runs on files have read

    @property
    def name(self) -> str:
        return self.profile.name

    @functools.cached_property
    def tried(self) -> dict:
        return tried(paths.REFERENCE / self.name)

    def holds(self, part: Part) -> bool:
        from lab.claims import exact

        return exact.holds(part)

    def runs(self, number: str, label: str) -> list[Evidence]:
        """The finished runs of an arm up to the first seed that is missing, read once. Raises DataAbsent."""
        if (number, label) not in self._runs:
            self._runs[number, label] = self._read(number, label)
        return self._runs[number, label]

    def _read(self, number: str, label: str) -> list[Evidence]:
        from lab.experiments.catalogue import experiment, notebook
        from lab.runs import store

        setting, found = experiment(notebook(number), self.profile), []
        for spec in setting.seeds_of(label) if label in setting.arms else ():
            family = {member: store.find(member) for member in spec.family()}
            if family[spec] is None:
                break
            there = {member: result for member, result in family.items() if result is not None}
            self._files.update({member: result.files for member, result in there.items()})
            found.append(_evidence([*there.values()], [member.record() for member in family]))
        store.warn_of_other_files(self._files)
        return found

    def ratio(self, part: Part) -> tuple[Estimate, str] | None:
        """The estimate of the logarithm, and its device and case; None where it was not measured. Raises DataAbsent."""
        from lab.bench import cases

        if not (rows := cases.evidence(self.profile, part, self.ledger.hash(part, self.name))):
            return None
        seconds = {arm: np.log([row[part.metric] for row in rows if row["arm"] == arm]) for arm in part.contrast}
        return over_seeds(difference(seconds, part.contrast)), f"{rows[0]['device']}, {rows[0]['case']}"


def read_by(part: Part, p: Profile) -> list[RunSpec]:
    """The runs that the verdict on a part is read from, each arm with the seeds that it needs, seeds outermost."""
    from lab.experiments.catalogue import experiment, in_order, notebook

    shown, n = notebook(part.notebook), part.n.get(p.name, 0)
    if not (n and shown.arms_at(p)):
        return []
    arms = experiment(shown, p).arms
    read = [arms[label] for label in part.at_profile(p.name).arms if label in arms]
    return in_order([replace(arm, n=min(n, arm.n or n)) for arm in read], p.seeds)


def part_specs(parts: Sequence[Part], p: Profile) -> list[RunSpec]:
    """The runs that the verdicts on these parts are read from, part by part.

    Raises UsageError for a part that has no runs at this profile.
    """
    read = {part.id: read_by(part, p) for part in parts}
    if lone := [name for name, specs in read.items() if not specs]:
        raise UsageError(f"part {lone[0]} has no runs at profile {p.name}")
    return list(dict.fromkeys(itertools.chain(*read.values())))


def queue(p: Profile, notebooks: Sequence[Notebook]) -> list[RunSpec]:
    """The runs of several notebooks, each once: what the primary parts read, then what the others do, then the rest; part by
    part, so that a stop leaves whole verdicts. Raises UsageError as `catalogue.experiments`.
    """
    from lab.experiments.catalogue import all_specs

    rest, numbers = all_specs(p, notebooks), {one.number for one in notebooks}
    parts = sorted(ledger().parts.values(), key=lambda part: not part.primary)
    read = [spec for part in parts if part.notebook in numbers for spec in read_by(part, p)]
    return list(dict.fromkeys([*read, *rest]))


# ---------------------------------------------------------------------------------------------------- an archive


@dataclass(frozen=True)
class Archived:
    """A study as it was kept: `runs.jsonl`, `arms.csv` (which run is which arm), its claims table and tuning curves."""

    folder: Path
    name: str = "study"
    ledger: Ledger = field(default_factory=ledger)

    @functools.cached_property
    def archive(self) -> Archive:
        return Archive(self.folder)

    @functools.cached_property
    def tried(self) -> dict:
        return tried(self.folder)

    @functools.cached_property
    def claims(self) -> pd.DataFrame:
        """The claims table as it was committed, by part."""
        with intact(path := self.folder / "claims.csv"):
            return pd.read_csv(path, index_col="part")

    def holds(self, part: Part) -> bool:
        """As it was counted when the study was written."""
        return part.id in self.claims.index and self.claims.loc[part.id, "label"] == judge.EXACT

    def runs(self, number: str, label: str) -> list[Evidence]:
        families = [self.archive.family(result.hash) for result in self.archive.results(number).get(label, ())]
        return [_evidence(of, [self.archive.record(member.hash) for member in of]) for of in families]

    def ratio(self, part: Part) -> tuple[Estimate, str] | None:
        """Timings are not kept, only their mean, standard deviation and number in the claims table: t is over those."""
        if part.id not in self.claims.index or pd.isna(self.claims.loc[part.id, "ours"]):
            return None
        with intact(self.folder / "claims.csv"):
            row = self.claims.loc[part.id]
            estimate = Estimate(math.log(row["ours"]), (row["sd"] ** 2, 0.0, 0.0), int(row["n"]), 1)
        return estimate, row["note"].removeprefix("on ")


def committed(name: str) -> Archived:
    """What outputs/reference has under a name; its runs are parsed once."""
    return _committed(paths.REFERENCE / name, name)


@functools.cache
def _committed(folder: Path, name: str) -> Archived:
    return Archived(folder, name)


def reference() -> Archived | None:
    """The committed second study, where there is one."""
    return committed("study") if (paths.REFERENCE / "study" / "runs.jsonl").is_file() else None


def trace(source: Stored | Archived, part: Part) -> pd.DataFrame:
    """From a verdict to its runs: arm, seed by seed, with rates, run hash, commit, start, the ledger's hash and the data's.

    Where the pilot's estimate stands, the pilot's runs. "as now": made under the ledger's entry and recipe as they are.
    """
    if verdict(source, part).source == PILOT:
        source = Archived(paths.REFERENCE / PILOT, PILOT, source.ledger)
    here, rows = part.at_profile(source.name), []
    recipes = source.ledger.recipes.get(source.name, {}).get(part.notebook, {})
    now = source.ledger.hash(part, source.name) if recipes and source.name in part.n else None
    for arm in here.arms if part.kind != "ratio" else ():  # of a ratio the benchmark's own records tell
        recipe = recipes.get(arm, {"rates": {}, "record": None})
        for run in source.runs(part.notebook, arm):
            about, stored = run.result.about, run.result.ledger.get(part.id, "")
            rows.append({
                "arm": arm, "top1": round(run.result.metrics["top1"], 4), "rates": " ".join(f"{lr:g}" for lr in recipe["rates"].values()),
                "run": run.result.hash, "commit": about["commit"], "began": about.get("began", about["date"]),
                "device": about["device"], "ledger": stored, "as now": stored == now and run.record == recipe["record"],
                "data": run.data,
            })  # fmt: skip
    return pd.DataFrame(rows)
