"""Where verdicts are read from: the run store at a profile, or the archive of a study. Also which runs a verdict needs.

An archive is read without torch, so that the verdicts of a study can be recomputed on any machine; exact parts are counted.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from lab.claims.judge import Verdict, judge, ratio, verdict_table
from lab.claims.ledger import Part, ledger, part_hash
from lab.claims.statistics import Estimate, difference, interval, over_seeds
from lab.experiments.profiles import Profile
from lab.runs.results import Archive, Result
from vitlib.errors import UsageError, unknown

if TYPE_CHECKING:  # both need torch
    from lab.experiments.catalogue import Experiment
    from lab.runs.spec import RunSpec


@dataclass(frozen=True)
class Evidence:
    """The finished arms of one notebook, and what of their configuration a verdict depends on."""

    results: Mapping[str, Sequence[Result]] = field(default_factory=dict)  # arm -> one result per seed
    images: Mapping[str, int | None] = field(default_factory=dict)  # arm -> its labelled images; None = all
    classes: Mapping[str, int] = field(default_factory=dict)  # arm -> classes of its data
    ledgers: Mapping[str, Sequence[Mapping[str, str]]] = field(
        default_factory=dict
    )  # arm -> hashes that its runs stored
    absent: str = ""  # why there can be no runs here


class Source(Protocol):
    """Results of one profile: `Stored` or `Archived`."""

    profile: Profile

    def evidence(self, part: Part, labels: Collection[str]) -> Evidence:
        """Of these arms those that are finished."""

    def ratio(self, part: Part) -> tuple[Estimate | None, str]:
        """The logarithm of a ratio over process restarts, and the device; or None, and why it cannot be measured."""


def verdicts(source: Source, parts: Iterable[Part]) -> list[Verdict]:
    """The verdict on each part that belongs to the source's profile; nothing is trained."""
    return [verdict(source, part) for part in parts if part.belongs(source.profile.name)]


def verdict(source: Source, entry: Part) -> Verdict:
    """The verdict on one part. Raises UsageError where it names an arm that its notebook does not have."""
    p = source.profile
    if entry.kind == "exact":
        from lab.claims import exact  # counts models, which needs torch

        return judge(entry, {}, p.name, 0, 0, holds=exact.holds(entry))
    part, blank = entry.at_profile(p.name), judge(entry, {}, p.name, p.pairs, 0)
    if part.kind == "ratio":
        estimate, said = source.ratio(entry) if p.judged else (None, "")
        return ratio(blank, estimate, said) if estimate else replace(blank, note=said or blank.note)
    seen = source.evidence(entry, _labels(part, p))
    if seen.absent:
        return replace(blank, note=seen.absent)
    there, wanted = seen.results.keys(), part.min_pairs or p.pairs
    pairs = wanted if all(arm in there for arm in part.contrast_at(wanted)) else p.pairs
    arms = [arm for arm in part.arms(pairs) if arm in there]
    contrasted = {arm for at_size in part.contrasts(pairs) for arm in at_size} & there
    images = None if part.images == "all" else part.images
    as_fixed = all(seen.images[arm] == images for arm in contrasted)  # the number of images that the entry fixes
    hashes = [stored for arm in arms for stored in seen.ledgers[arm]] if as_fixed else []
    correct = {arm: np.stack([r.correct for r in results]) for arm, results in seen.results.items()}
    classes = next((seen.classes[arm] for arm in part.controls(pairs) if arm in there), 0)
    judged = judge(entry, correct, p.name, pairs, classes, hashes=hashes)
    names = sorted(r.hash for arm in arms for r in seen.results[arm]) if judged.estimate else []
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

    def evidence(self, part: Part, labels: Collection[str]) -> Evidence:
        from lab.data.published import DataAbsent
        from lab.experiments.catalogue import experiment, notebook
        from lab.runs import store

        shown = notebook(part.notebook)
        if shown.arms_at(self.profile) is None:
            return Evidence()
        try:
            setting = experiment(shown, self.profile)
        except DataAbsent as fault:
            return Evidence(absent=str(fault))
        known_arms(part, setting)
        results = setting.finished(labels).results
        specs = {arm: setting.arms[arm].spec for arm in results}
        families = {arm: [m for spec in setting.seeds_of(arm) for m in spec.family()] for arm in results}
        members = {member for family in families.values() for member in family}
        finished = {spec: result for spec in members if (result := store.find(spec)) is not None}
        store.warn_of_other_files({spec: result.files for spec, result in finished.items()})
        return Evidence(
            results, {arm: spec.images for arm, spec in specs.items()},
            {arm: spec.model.num_classes for arm, spec in specs.items()},
            {arm: [finished[m].ledger for m in family if m in finished] for arm, family in families.items()},
        )  # fmt: skip

    def ratio(self, part: Part) -> tuple[Estimate | None, str]:
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

    def evidence(self, part: Part, labels: Collection[str]) -> Evidence:
        results = {arm: found for arm, found in self.archive.results(part.notebook).items() if arm in labels}
        specs = {arm: self.archive.record(found[0].hash) for arm, found in results.items()}
        ledgers = {
            arm: [member.ledger for result in found for member in self.archive.family(result.hash)]
            for arm, found in results.items()
        }
        images = {arm: spec["images"] for arm, spec in specs.items()}
        return Evidence(results, images, {arm: spec["model"]["num_classes"] for arm, spec in specs.items()}, ledgers)

    def ratio(self, part: Part) -> tuple[Estimate | None, str]:
        """Timings were not kept, only their mean, standard deviation and number in the claims table: t is over those."""
        row = self.claims.loc[part.id]
        if pd.isna(row["ours"]):
            return None, ""
        return Estimate(math.log(row["ours"]), (row["sd"] ** 2, 0.0, 0.0), int(row["n"]), 1), row["note"].removeprefix(
            "on "
        )


def recomputed(archived: Archived) -> tuple[pd.DataFrame, list[str]]:
    """The claims table of an archive from its runs, and each cell that is not as committed (numbers to 1e-9)."""
    made = verdict_table(verdicts(archived, archived.parts()))
    made = pd.read_csv(io.StringIO(made.to_csv(index=False)), dtype={"notebook": str, "runs": str}, index_col="part")
    kept, wrong = archived.claims, []
    if list(made.index) != list(kept.index) or list(made.columns) != list(kept.columns):
        return made, [f"the rows or columns differ: {len(made)} parts, committed {len(kept)}"]
    for part in kept.index:
        for column in kept.columns:
            new, old = made.loc[part, column], kept.loc[part, column]
            if not (_equal(new, old) or (pd.isna(new) and pd.isna(old))):
                wrong.append(f"{part}, {column}: {new}, committed {old}")
    return made, wrong


def recomputed_text(archived: Archived) -> tuple[str, bool]:
    """What `python -m lab claims --pilot` prints, and whether everything is as committed."""
    table, wrong = recomputed(archived)
    cells, printed_otherwise = printed_cells(archived)
    lines = [table[["verdict", "stance"]].to_string(), *wrong, *printed_otherwise]
    lines.append(f"{len(table)} parts recomputed from their runs: {len(wrong)} cells of claims.csv differ")
    lines.append(f"{cells} cells of the tables recomputed: {len(printed_otherwise)} differ")
    return "\n".join(lines), not (wrong or printed_otherwise)


def _equal(new: object, old: object) -> bool:
    if isinstance(old, float) and isinstance(new, float | int):
        return math.isclose(new, old, rel_tol=1e-9, abs_tol=1e-9)
    return new == old


def printed_cells(archived: Archived) -> tuple[int, list[str]]:
    """How many cells of the committed tables were recomputed from the runs, and those that read otherwise.

    Top-1 with its standard deviation, and differences with their intervals, of every table that has a row per arm.
    """
    count, wrong = 0, []
    for path in sorted((archived.folder / "tables").glob("*.csv")):
        table = pd.read_csv(path, dtype=str)
        results = archived.archive.results(path.stem.partition("_")[0])
        if "arm" not in table or not results:
            continue
        for row in table.to_dict("records"):
            for column, text in row.items():
                new = _cell(results, row["arm"], column)
                if new and text != "–":
                    count += 1
                    wrong += [] if new == text else [f"{path.stem}, {row['arm']}, {column}: {new}, committed {text}"]
    return count, wrong


def _cell(results: Mapping[str, Sequence[Result]], arm: str, column: str) -> str:
    """What a cell says by the runs; "" for a column of something else."""
    if column == "committed reference" or column.startswith("top1, this run"):
        top1 = [result.metrics["top1"] for result in results[arm]]
        return f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} (n={len(top1)})"
    if column.startswith("minus ") and column.endswith(", points"):
        other = column.removeprefix("minus ").removesuffix(", points")
        correct = {label: np.stack([r.correct for r in results[label]]) for label in (arm, other)}
        e = interval(difference(correct, {arm: 1.0, other: -1.0}))
        return f"{e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"
    return ""
