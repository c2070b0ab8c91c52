"""Verdicts on the parts of the ledger, read from finished runs, and how claims and tuning are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lab.bench import cases
from lab.claims import exact, tuning
from lab.claims.judge import Verdict, claim_stance, judge, verdict_table
from lab.claims.ledger import Part, arm_at, ledger, part_hash
from lab.claims.statistics import Estimate
from lab.data.external import DataAbsent
from lab.experiments.catalogue import NOTEBOOKS, Runs, experiment
from lab.experiments.profiles import profile
from lab.report.accuracy import correct, finished
from lab.report.tables import save_table
from lab.runs import store


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
    seen = correct(Runs(setting, found))
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


def verdict_rows(chosen: Sequence[Verdict], family: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as a table to print."""
    table = verdict_table(chosen, family)
    by_part = {v.part.id: v for v in chosen}

    def number(value: object, digits: int = 2, sign: str = "+") -> str:
        return "–" if pd.isna(value) else f"{value:{sign}.{digits}f}"

    def p(value: object) -> str:
        return "–" if pd.isna(value) else f"{value:.3f}" if value >= 0.001 else "< 0.001"

    def paired(estimate: Estimate | None, ratio: bool) -> str:
        return "–" if estimate is None or ratio else "[{:+.2f}, {:+.2f}]".format(*estimate.paired)

    rows = []
    for row in table.itertuples():
        ratio = ledger()[row.part].kind == "ratio"
        sign = "" if ratio else "+"
        ours = "–" if pd.isna(row.ours) else f"{row.ours:{sign}.2f} [{row.low:{sign}.2f}, {row.high:{sign}.2f}]"
        rows.append({
            "part": row.part, "contrast": row.contrast or "exact", "n": "–" if pd.isna(row.n) else str(row.n),
            "ours, points (ratio for F3)": ours, "paper, at its scale": number(row.paper, 2, sign), "margin": number(row.margin, 1, ""),
            "p": p(row.p), "p (Holm)": p(row.p_holm), "verdict": row.verdict,
            "note": by_part[row.part].note or "–", "paired t over seeds": paired(by_part[row.part].estimate, ratio),
            "smallest visible": number(row.smallest_visible, 2, ""),
            "seeds for the paper's difference": "–" if row.seeds_needed is None or pd.isna(row.seeds_needed) else str(row.seeds_needed),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    return table.loc[:, (table != "–").any()]  # at smoke, and where all is exact, most columns would be empty


def stances(chosen: Sequence[Verdict]) -> pd.DataFrame:
    """One row a claim: what its parts say together."""
    rows = []
    for claim in dict.fromkeys(v.part.claim for v in chosen):
        mine = [v for v in chosen if v.part.claim == claim]
        words = "; ".join(f"{v.part.id}: {v.text}" if len(mine) > 1 else v.text for v in mine)
        rows.append({"claim": claim, "says": " ".join(v.part.title for v in mine[:1]), "parts": words,
                     "stance": claim_stance(mine), "notebook": NOTEBOOKS[mine[0].part.notebook][0]})  # fmt: skip
    return pd.DataFrame(rows)


def claims_table(profile_name: str) -> str:
    """Every part's verdict at a profile, for the terminal; also written to outputs/<profile>/claims.csv."""
    every = verdicts(profile_name)
    save_table(verdict_table(every), profile_name, "claims", "")
    table = stances(every)[["claim", "stance", "parts"]]
    return f"claims at profile {profile_name}\n{table.to_markdown(index=False, tablefmt='simple')}"


def tuning_table(profile_name: str, chosen: Mapping[str, tuning.Group]) -> str:
    """Validation accuracy at every rate, margins, contrasts at the best rates, for the terminal; all of it written as CSV too."""
    rows = tuning.table(profile_name, tuning.GROUPS)
    margins = pd.DataFrame(tuning.margins(profile_name))
    contrasts = pd.DataFrame(tuning.contrasts(profile_name, rows))
    for table, name in ((pd.DataFrame(rows), "tuning"), (margins, "margins"), (contrasts, "best_rates")):
        save_table(table, profile_name, name, "")
    rates = pd.DataFrame([row for row in rows if row["group"] in chosen])
    parts = [
        table.to_markdown(index=False, tablefmt="simple", floatfmt=".4g")
        for table in (rates, margins, contrasts)
        if len(table)
    ]
    return "\n\n".join(parts)
