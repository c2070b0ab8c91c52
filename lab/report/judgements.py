"""Verdicts on the parts of the ledger, read from finished runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from lab.bench import cases
from lab.claims import exact
from lab.claims.judge import Verdict, judge
from lab.claims.ledger import Part, arm_at, ledger, part_hash
from lab.data.published import DataAbsent
from lab.experiments.catalogue import NOTEBOOKS, Experiment, experiment
from lab.experiments.profiles import profile
from lab.runs import store
from lab.runs.results import Result


def verdicts(profile_name: str, notebook: str | None = None) -> list[Verdict]:
    """The verdict on every part of the ledger, or of one notebook, from finished runs; nothing is trained."""
    parts = [part for part in ledger().values() if notebook in (None, part.notebook) and part.belongs(profile_name)]
    return [_verdict(part, profile_name) for part in parts]


def tested_elsewhere(profile_name: str, notebook: str) -> list[Verdict]:
    """The verdict on every part of other notebooks that is no count: with this one's, the family of Holm's correction."""
    parts = [part for part in ledger().values() if part.notebook != notebook and part.belongs(profile_name)]
    return [_verdict(part, profile_name) for part in parts if part.kind != "exact"]


def _verdict(entry: Part, profile_name: str) -> Verdict:
    if entry.kind == "exact":
        return judge(entry, {}, profile_name, 0, 0, holds=exact.holds(entry.id))
    try:
        return _trained_verdict(entry, profile_name)
    except DataAbsent as fault:
        return replace(judge(entry, {}, profile_name, profile(profile_name).pairs, 0), note=str(fault))


def _trained_verdict(entry: Part, profile_name: str) -> Verdict:
    p = profile(profile_name)
    part = entry.at_profile(p.name)
    classes = _classes(part, p.name)
    if part.kind == "ratio":
        rows = cases.evidence(p, entry, part_hash(entry.entry(p.name)))
        if not rows:
            return judge(entry, {}, p.name, p.pairs, classes)
        arms = {arm: np.array([row[part.metric] for row in rows if row["arm"] == arm]) for arm in part.contrast}
        hashes = [{entry.key(p.name): rows[0]["ledger"]}]
        device = f"{rows[0]['device']}, {rows[0]['case']}"
        return judge(entry, arms, p.name, p.pairs, classes, hashes=hashes, device=device)
    if NOTEBOOKS[part.notebook][1] is None:  # no run of this kind exists
        return judge(entry, {}, p.name, p.pairs, classes)
    setting = experiment(part.notebook, p.name)
    sizes = (p.pairs, part.min_pairs or p.pairs)
    found = finished(setting, {arm for pairs in sizes for arm in (*part.arms(pairs), part.parent)})
    pairs = _pairs(part, p.pairs, found)
    arms = [arm for arm in part.arms(pairs) if arm in found]
    family = {m for arm in arms for seed in p.seeds for m in setting.arms[arm].with_seed(seed).family()}
    there = {spec: result for spec in family if (result := store.find(spec)) is not None}
    store.warn_of_other_files({spec: result.files for spec, result in there.items()})
    hashes = [result.ledger for result in there.values()]
    images = None if part.images == "all" else part.images
    contrasted = {arm for at_size in part.contrasts(pairs) for arm in at_size if arm in found}
    if any(setting.arms[arm].images != images for arm in contrasted):
        hashes = []  # not the number of images that the entry fixes
    seen = {arm: np.stack([r.correct for r in results]) for arm, results in found.items()}
    verdict = judge(entry, seen, p.name, pairs, classes, hashes=hashes)
    names = sorted(r.hash for arm in arms for r in found[arm]) if verdict.estimate else []
    return replace(verdict, runs=tuple(names))


def _classes(part: Part, profile_name: str) -> int:
    """The number of classes of the data that a part's control was trained on; of the profile's where it has no run."""
    p = profile(profile_name)
    arms = experiment(part.notebook, p.name).arms if part.control and NOTEBOOKS[part.notebook][1] else {}
    control = arms.get(arm_at(part.control, p.pairs)) if arms else None
    return control.model.num_classes if control else 0


def _pairs(part: Part, own: int, found: Mapping[str, object]) -> int:
    """The number of pairs at which a part is looked at: what it asks for where that was run, else the profile's own."""
    wanted = part.min_pairs or own
    return wanted if all(arm in found for arm in part.contrast_at(wanted)) else own


def finished(setting: Experiment, chosen: Collection[str] | None = None) -> dict[str, list[Result]]:
    """Arm -> results at exactly the profile's seeds, of all arms or the chosen ones; one with a seed missing is left out."""
    found = {}
    for arm, spec in setting.arms.items():
        if chosen is not None and arm not in chosen:
            continue
        results = [store.find(spec.with_seed(seed)) for seed in setting.profile.seeds]
        if all(results):
            found[arm] = results
    return found
