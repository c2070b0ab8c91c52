"""Where verdicts are read from: the run store at a profile, or the archive of a study. Also which runs a verdict needs.

An archive is read without torch, so that the verdicts of a study can be recomputed on any machine; exact parts are counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lab.claims.judge import Verdict, judge, ratio
from lab.claims.ledger import Part, ledger, part_hash
from lab.claims.statistics import Estimate, difference, over_seeds
from lab.experiments.profiles import Profile
from lab.runs.results import Archive, Result
from vitlib.errors import UsageError, unknown

if TYPE_CHECKING:  # both need torch
    from lab.experiments.catalogue import Experiment
    from lab.runs.spec import RunSpec


@dataclass(frozen=True)
class Finished:
    """A finished arm, and what of its configuration a verdict depends on."""

    results: Sequence[Result]  # one per seed
    images: int | None  # labelled; None = all
    classes: int
    ledgers: Sequence[Mapping[str, str]]  # the hashes that its runs stored, and those whose weights they began with


def verdicts(source: Stored | Archived, parts: Iterable[Part]) -> list[Verdict]:
    """The verdict on each part that belongs to the source's profile; nothing is trained."""
    return [verdict(source, part) for part in parts if part.belongs(source.profile.name)]


def verdict(source: Stored | Archived, entry: Part) -> Verdict:
    """The verdict on one part. Raises UsageError where it names an arm that its notebook does not have."""
    p = source.profile
    if entry.kind == "exact":
        from lab.claims import exact  # counts models, which needs torch

        return judge(entry, {}, p.name, 0, 0, holds=exact.holds(entry))
    part, blank = entry.at_profile(p.name), judge(entry, {}, p.name, p.pairs, 0)
    if part.kind == "ratio":
        estimate, said = source.ratio(entry) if p.judged else (None, "")
        return ratio(blank, estimate, said) if estimate else replace(blank, note=said or blank.note)
    there, absent = source.finished(entry, _labels(part, p))
    if absent:
        return replace(blank, note=absent)
    wanted = part.min_pairs or p.pairs
    pairs = wanted if all(arm in there for arm in part.contrast_at(wanted)) else p.pairs
    arms = [arm for arm in part.arms(pairs) if arm in there]
    contrasted = {arm for at_size in part.contrasts(pairs) for arm in at_size} & there.keys()
    images = None if part.images == "all" else part.images
    as_fixed = all(there[arm].images == images for arm in contrasted)  # the number of images that the entry fixes
    hashes = [stored for arm in arms for stored in there[arm].ledgers] if as_fixed else []
    correct = {arm: np.stack([r.correct for r in of_arm.results]) for arm, of_arm in there.items()}
    classes = next((there[arm].classes for arm in part.controls(pairs) if arm in there), 0)
    judged = judge(entry, correct, p.name, pairs, classes, hashes=hashes)
    names = sorted(r.hash for arm in arms for r in there[arm].results) if judged.estimate else []
    return replace(judged, runs=tuple(names))


def _labels(part: Part, p: Profile) -> list[str]:
    """Every arm that a verdict may read: at the profile's number of pairs, and at the fewest that the part asks for."""
    labels = [arm for pairs in (p.pairs, part.min_pairs or p.pairs) for arm in (*part.arms(pairs), part.parent) if arm]
    return list(dict.fromkeys(labels))


# ---------------------------------------------------------------------------------------------------- the run store


@dataclass(frozen=True)
class Stored:
    """What the run store and the benchmarks of this checkout have at a profile."""

    profile: Profile

    def finished(self, part: Part, labels: Collection[str]) -> tuple[dict[str, Finished], str]:
        """Those of a part's arms whose seeds are all finished, or why there can be none."""
        from lab.data.published import DataAbsent
        from lab.experiments.catalogue import experiment, notebook
        from lab.runs import store

        shown = notebook(part.notebook)
        if shown.arms_at(self.profile) is None:
            return {}, ""
        try:
            setting = experiment(shown, self.profile)
        except DataAbsent as fault:
            return {}, str(fault)
        known_arms(part, setting)
        there, files = {}, {}
        for arm, results in setting.finished(labels).results.items():
            members = {member: store.find(member) for spec in setting.seeds_of(arm) for member in spec.family()}
            whole = {spec: result for spec, result in members.items() if result is not None}
            files |= {spec: result.files for spec, result in whole.items()}
            spec = setting.arms[arm].spec
            there[arm] = Finished(results, spec.images, spec.model.num_classes, [r.ledger for r in whole.values()])
        store.warn_of_other_files(files)
        return there, ""

    def ratio(self, part: Part) -> tuple[Estimate | None, str]:
        """The estimate of the logarithm, and its device and case; or none, and why it cannot be measured."""
        from lab.bench import cases
        from lab.data.published import DataAbsent

        try:
            rows = cases.evidence(self.profile, part, part_hash(part.entry(self.profile.name)))
        except DataAbsent as fault:
            return None, str(fault)
        if not rows:
            return None, ""
        seconds = {arm: np.log([row[part.metric] for row in rows if row["arm"] == arm]) for arm in part.contrast}
        return over_seeds(difference(seconds, part.contrast)), f"{rows[0]['device']}, {rows[0]['case']}"


def known_arms(part: Part, setting: Experiment) -> None:
    """Raises UsageError where a part names an arm that its notebook does not have, at a profile that has every arm."""
    p, there = setting.profile, part.at_profile(setting.profile.name)
    if p.every_arm and (p.paper or (setting.arms and part.scope != "imagenet")):
        named = [] if p.paper else [*there.contrast, there.control]  # 18x3 is 12x3 at 36 pairs, but no arm itself
        for label in [*filter(None, named), *_labels(there, replace(p, pairs=max(p.pairs, part.min_pairs)))]:
            if label not in setting.arms:
                raise unknown(
                    f"arm of notebook {setting.notebook.file} in ledger entry {part.id}:", label, setting.arms
                )


def part_specs(parts: Sequence[Part], profile: Profile) -> list[RunSpec]:
    """The runs that the verdicts on these parts are read from, part by part, seeds outermost.

    Raises UsageError for a part that has no runs at this profile.
    """
    from lab.experiments.catalogue import experiment, in_order, notebook

    specs: dict[RunSpec, None] = {}
    for part in parts:
        shown = notebook(part.notebook)
        has_runs = part.belongs(profile.name) and shown.arms_at(profile)
        read = _read(part, experiment(shown, profile)) if has_runs else []
        if not read:
            raise UsageError(f"part {part.id} has no runs at profile {profile.name}")
        specs |= dict.fromkeys(in_order(read, profile.seeds))
    return list(specs)


def queue(experiments: Sequence[Experiment]) -> list[RunSpec]:
    """The runs of several experiments of one profile, each once, seeds outermost.

    Where every arm is run, which takes hours: what each part of a claim reads, the cheapest part first, then the rest,
    so that a stop leaves whole verdicts.
    """
    from lab.cost.plan import formula_seconds
    from lab.experiments.catalogue import in_order

    if not experiments:
        return []
    p, rest = experiments[0].profile, [arm.spec for one in experiments for arm in one.arms.values()]
    blocks = [
        _read(part, one)
        for one in experiments if p.every_arm
        for part in ledger().values() if part.notebook == one.notebook.number and part.belongs(p.name)
    ]  # fmt: skip
    blocks.sort(key=lambda specs: sum(formula_seconds(spec) for spec in {m for spec in specs for m in spec.family()}))
    return list(dict.fromkeys(spec for block in (*blocks, rest) for spec in in_order(block, p.seeds)))


def _read(part: Part, setting: Experiment) -> list[RunSpec]:
    """The runs, without seeds, that the verdict on a part is read from."""
    p = setting.profile
    there = part.at_profile(p.name)
    labels = dict.fromkeys([*there.arms(max(p.pairs, there.min_pairs)), there.parent])
    return [setting.arms[label].spec for label in labels if label in setting.arms]


# ---------------------------------------------------------------------------------------------------- an archive


@dataclass(frozen=True)
class Archived:
    """A study as it was kept: `runs.jsonl`, `arms.csv` (which run is which arm), its ledger and its claims table.

    Runs are found by the hashes of that study, never by those of today's configurations.
    """

    folder: Path
    profile: Profile

    @functools.cached_property
    def archive(self) -> Archive:
        return Archive(self.folder)

    @functools.cached_property
    def claims(self) -> pd.DataFrame:
        """The claims table as it was committed, by part."""
        return pd.read_csv(self.folder / "claims.csv", dtype={"notebook": str, "runs": str}, index_col="part")

    def parts(self) -> list[Part]:
        """The ledger that the study was judged under."""
        return list(ledger(self.folder / "claims.toml").values())

    def finished(self, part: Part, labels: Collection[str]) -> tuple[dict[str, Finished], str]:
        there, archive = {}, self.archive
        for arm, results in archive.results(part.notebook).items():
            if arm in labels:
                spec = archive.record(results[0].hash)
                ledgers = [member.ledger for result in results for member in archive.family(result.hash)]
                there[arm] = Finished(results, spec["images"], spec["model"]["num_classes"], ledgers)
        return there, ""

    def ratio(self, part: Part) -> tuple[Estimate | None, str]:
        """Timings were not kept, only their mean, standard deviation and number in the claims table: t is over those."""
        row = self.claims.loc[part.id]
        if pd.isna(row["ours"]):
            return None, ""
        estimate = Estimate(math.log(row["ours"]), (row["sd"] ** 2, 0.0, 0.0), int(row["n"]), 1)
        return estimate, row["note"].removeprefix("on ")
