"""How a claim is judged: the label of a part, the stance of a claim.

What is judged is fixed beforehand in the ledger (`lab.claims.ledger`, `outputs/paper/claims.toml`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from lab.claims import statistics
from lab.claims.ledger import PROFILES, Part, ledger, part_hash
from lab.claims.statistics import Estimate, difference, interval
from vitlib.errors import UsageError, unknown

# The labels of a part.
SAME, OPPOSITE = "same direction", "opposite direction"
EQUIVALENT, DIFFERENT = "equivalent within m", "different by more than m"
NOT_INFERIOR, INFERIOR = "not inferior by m", "inferior by more than m"
EXACT, FAILS = "exact", "fails"
INCONCLUSIVE, NOT_RUN = "inconclusive", "not run"
OUT_OF_SCOPE, SMOKE = "out of scope at this scale", "not judged at smoke"

PREDICTED = {
    "exact": EXACT, "superiority": SAME, "slope": SAME, "ratio": SAME, "equivalence": EQUIVALENT,
    "non-inferiority": NOT_INFERIOR,
}  # fmt: skip


def superiority(estimate: Estimate, m: float | None) -> str:
    """Also the label of a slope and of the logarithm of a ratio, both compared with 0; m None = no equivalence."""
    low, high = estimate.bounds(0.95)
    if low > 0:
        return SAME
    if high < 0:
        return OPPOSITE
    return EQUIVALENT if m is not None and _inside(estimate, m) else INCONCLUSIVE


def equivalence(estimate: Estimate, m: float) -> str:
    low, high = estimate.bounds(0.95)
    if _inside(estimate, m):
        return EQUIVALENT
    return DIFFERENT if low > m or high < -m else INCONCLUSIVE


def non_inferiority(estimate: Estimate, m: float) -> str:
    if estimate.bounds(0.90)[0] > -m:
        return NOT_INFERIOR
    return INFERIOR if estimate.bounds(0.95)[1] < -m else INCONCLUSIVE


def _inside(estimate: Estimate, m: float) -> bool:
    """Two one-sided tests at 5 % each."""
    low, high = estimate.bounds(0.90)
    return -m < low and high < m


LABELS: dict[str, Callable[[Estimate, float | None], str]] = {
    "superiority": superiority, "slope": superiority, "ratio": superiority, "equivalence": equivalence,
    "non-inferiority": non_inferiority,
}  # fmt: skip


def above(correct: Mapping[str, np.ndarray], a: str, b: str, bound: float) -> bool:
    """The 95 % interval of a - b lies above `bound` points."""
    return interval(difference(correct, {a: 1.0, b: -1.0})).low > bound


def run_checks(
    part: Part, correct: Mapping[str, np.ndarray], profile: str, pairs: int, num_classes: int
) -> dict[str, bool]:
    """Check -> passed, for the checks that apply at this profile; `part` as it is there."""

    def control_learned() -> bool:  # at least twice chance, and an error of at least 5 %: neither floor nor ceiling
        return all(2 / num_classes <= correct[arm].mean() <= 0.95 for arm in part.controls(pairs))

    checks: dict[str, Callable[[], bool]] = {
        "control learned": control_learned,
        "full beats head": lambda: above(correct, *part.check_arms("full beats head"), part.margin),
        "pre-training helps": lambda: above(correct, *part.check_arms("pre-training helps"), 0.0),
    }
    applying = [name for name in part.checks if not (name == "control learned" and profile == "imagenet")]
    return {name: bool(checks[name]()) for name in applying}


@dataclass(frozen=True)
class Verdict:
    """What is said about one part at one profile."""

    part: Part
    profile: str
    contrast: str  # in the arms of this scale
    word: str
    stance: str = "open"  # supports | contradicts | open
    reproduction: str = ""  # "reproduced" | "not reproduced", at profile imagenet only
    estimate: Estimate | None = None
    margin: float | None = None
    p: float | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    smallest_visible: float | None = None  # points, or a ratio
    seeds_needed: int | str | None = None
    note: str = ""
    runs: tuple[str, ...] = ()  # the hashes of the runs that it was read from

    @property
    def text(self) -> str:
        """The label, with what only profile imagenet may add."""
        return f"{self.word} ({self.reproduction})" if self.reproduction else self.word

    @property
    def ours(self) -> tuple[float, float, float] | None:
        """Mean, low, high of the 95 % interval, in points or as a ratio."""
        if self.estimate is None:
            return None
        values = (self.estimate.mean, self.estimate.low, self.estimate.high)
        return tuple(map(math.exp, values)) if self.part.kind == "ratio" else values


def judge(
    part: Part, correct: Mapping[str, np.ndarray], profile: str, pairs: int, num_classes: int, *,
    hashes: Iterable[Mapping[str, str]] = (), holds: bool | None = None, device: str = "",
) -> Verdict:  # fmt: skip
    """The verdict on one part.

    correct: arm -> (S, N) bool, or for a ratio arm -> (restarts,) seconds or MB. pairs: of the models compared, which
    picks the arms of a contrast over layers. hashes: the ledger's hashes that each run stored; without them a trained
    part reads `not run`. holds: the outcome of an exact part. device: named beside a ratio.
    """
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    key, fixed, part = part.key(profile), part_hash(part.entry(profile)), part.at_profile(profile)
    contrast = {} if part.kind == "exact" else part.contrast_at(pairs)
    blank = Verdict(part, profile, _text(contrast), NOT_RUN, margin=part.margin)
    if part.kind == "exact":
        return blank if holds is None else _with_stance(replace(blank, word=EXACT if holds else FAILS))
    if profile == "smoke":
        return replace(blank, word=SMOKE)

    in_scope = (part.scope != "imagenet" or profile == "imagenet") and pairs >= part.min_pairs
    missing = _missing(part, correct, pairs, in_scope) or _stale(key, fixed, list(hashes))
    if missing:
        return replace(blank, note=missing)
    if part.kind == "ratio":
        if not device:
            raise UsageError(f"part {part.id} is a ratio of times or memory: the device must be named")
        estimate = statistics.over_seeds(difference({arm: np.log(correct[arm]) for arm in contrast}, contrast))
        return ratio(blank, estimate, device)
    if part.kind == "slope":
        points = [100 * difference(correct, at_size).mean(axis=1) for at_size in part.contrasts(pairs)]
        estimate = statistics.slope(np.stack(points, axis=1), part.sizes)
    else:
        estimate = interval(difference(correct, contrast))
    measured = replace(blank, estimate=estimate, note=_note(part, correct, pairs))
    if not in_scope:
        return replace(measured, word=OUT_OF_SCOPE)
    return _concluded(replace(measured, checks=run_checks(part, correct, profile, pairs, num_classes)), part.paper)


def ratio(blank: Verdict, estimate: Estimate, device: str) -> Verdict:
    """The verdict on a ratio of times or memory from the estimate of its logarithm."""
    paper = blank.part.paper
    verdict = _concluded(replace(blank, estimate=estimate, note=f"on {device}"), paper and math.log(paper))
    return replace(verdict, smallest_visible=math.exp(verdict.smallest_visible))


def _concluded(verdict: Verdict, paper: float | None) -> Verdict:
    """With label, p, stance, and what would have been seen; the paper's value in the unit of the estimate."""
    part, estimate = verdict.part, verdict.estimate
    failed = [name for name, passed in verdict.checks.items() if not passed]
    word = f"{INCONCLUSIVE} (check failed: {', '.join(failed)})" if failed else LABELS[part.kind](estimate, part.margin)
    needed = statistics.seeds_needed(estimate, paper) if paper else None  # a difference of 0 cannot be seen
    p, visible = statistics.p_value(part.kind, estimate, part.margin), statistics.smallest_visible(estimate)
    return _with_stance(replace(verdict, word=word, p=p, smallest_visible=visible, seeds_needed=needed))


def claim_stance(verdicts: Sequence[Verdict], entries: Mapping[str, Part] | None = None) -> str:
    """`contradicts` if any part does, `supports` if all parts of the claim do, else `open (the open parts)`.

    Parts that the ledger has and `verdicts` has not are open.
    """
    claims = {verdict.part.claim for verdict in verdicts}
    if len(claims) != 1:
        raise UsageError(f"the stance of one claim was asked for, with parts of {len(claims)}: {sorted(claims)}")
    profile = verdicts[0].profile
    parts = [part for part in (entries or ledger()).values() if part.claim in claims and part.belongs(profile)]
    stances = {part.id: "open" for part in parts}
    return stance_of(stances | {verdict.part.id: verdict.stance for verdict in verdicts})


def stance_of(parts: Mapping[str, str]) -> str:
    """What a claim's parts say together, from each part's stance."""
    if "contradicts" in parts.values():
        return "contradicts"
    still_open = [id for id, stance in parts.items() if stance == "open"]
    return f"open ({', '.join(still_open)})" if still_open else "supports"


def verdict_table(verdicts: Sequence[Verdict], family: Sequence[Verdict] | None = None) -> pd.DataFrame:
    """One row per verdict, numbers not rounded.

    Holm's family is every non-exact part judged in one profile: pass all of them as `family` when the table shows
    only some.
    """
    adjusted = {}
    for profile in PROFILES:
        judged = {v.part.id: v.p for v in (*(family or ()), *verdicts) if v.profile == profile and v.p is not None}
        adjusted |= {(profile, id): q for id, q in zip(judged, statistics.holm(list(judged.values())), strict=True)}
    return pd.DataFrame([_row(v, adjusted) for v in verdicts], columns=list(COLUMNS)).astype(COLUMNS)


# Columns of the claims table. sd, seed_se, image_se: in points, of a ratio of its logarithm.
COLUMNS = dict.fromkeys(("part", "claim", "title", "notebook", "contrast", "test"), object) | {
    "n": "Int64", "test_images": "Int64",
    **dict.fromkeys(("ours", "sd", "low", "high", "seed_se", "image_se", "paired_low", "paired_high", "paper"), float),
    "paper_source": object, "paper_confidence": object,
    **dict.fromkeys(("margin", "p", "p_holm"), float),
    **dict.fromkeys(("checks", "verdict", "stance"), object),
    "smallest_visible": float, "seeds_needed": object,  # a number or words
    "note": object, "runs": object,
}  # fmt: skip


def _row(v: Verdict, adjusted: Mapping[tuple[str, str], float]) -> dict[str, object]:
    part, e = v.part, v.estimate
    row = {
        "part": part.id, "claim": part.claim, "title": part.title, "notebook": part.notebook, "contrast": v.contrast,
        "test": part.kind, "paper": part.paper, "paper_source": part.paper_source,
        "paper_confidence": part.paper_confidence, "margin": v.margin, "p": v.p, "p_holm": adjusted.get((v.profile, part.id)),
        "checks": "; ".join(f"{name}: {'passed' if passed else 'failed'}" for name, passed in v.checks.items()),
        "verdict": v.text, "stance": v.stance, "smallest_visible": v.smallest_visible, "seeds_needed": v.seeds_needed,
        "note": v.note, "runs": " ".join(v.runs),
    }  # fmt: skip
    if e is None:
        return row
    mean, low, high = v.ours
    return row | {
        "n": e.n, "test_images": e.images if e.images > 1 else None, "ours": mean, "sd": e.sd, "low": low, "high": high,
        "seed_se": math.sqrt(e.seed_term), "image_se": math.sqrt(e.image_term),
        "paired_low": e.paired[0], "paired_high": e.paired[1],
    }  # fmt: skip


def _text(contrast: Mapping[str, float]) -> str:
    """ "a - b", "a - b - c + d"."""
    terms = [f"{'-' if c < 0 else '+'} {'' if abs(c) == 1 else f'{abs(c):g} '}{arm}" for arm, c in contrast.items()]
    return " ".join(terms).removeprefix("+ ")


def _missing(part: Part, correct: Mapping[str, np.ndarray], pairs: int, in_scope: bool) -> str:
    """Which runs a part lacks, or ""."""
    arms = part.arms(pairs) if in_scope else [arm for contrast in part.contrasts(pairs) for arm in contrast]
    if absent := [arm for arm in arms if arm not in correct]:
        return f"no runs of {', '.join(absent)}"
    wrong = [f"{arm} {len(correct[arm])}" for arm in arms if len(correct[arm]) != part.n]
    return f"the ledger fixes n = {part.n}, but there are {', '.join(wrong)}" if wrong else ""


def _stale(key: str, fixed: str, hashes: Sequence[Mapping[str, str]]) -> str:
    """Whether the runs stored another hash of the entry than it has now, or none."""
    if not hashes or any(stored.get(key) != fixed for stored in hashes):
        return "the runs were not made under this entry of the ledger: move outputs/runs away to make them again"
    return ""


def _note(part: Part, correct: Mapping[str, np.ndarray], pairs: int) -> str:
    if part.parent is not None:
        if part.parent not in correct:
            return "adaptation to a new resolution (the low-resolution parent was not run)"
        return "" if above(correct, "full", part.parent, 0.0) else "adaptation to a new resolution"
    if part.sizes:
        return f"the change of this difference from {part.sizes[0]} to {part.sizes[-1]}, a line on log2 a seed"
    return f"at {pairs} pairs" if part.names_layers else ""


def _with_stance(verdict: Verdict) -> Verdict:
    part, word, paper = verdict.part, verdict.word, verdict.part.paper
    stance = "open"
    if word == PREDICTED[part.kind]:
        stance = "supports"
    elif word in (OPPOSITE, DIFFERENT, INFERIOR, FAILS):
        stance = "contradicts"
    elif word == EQUIVALENT and paper is not None and abs(paper) > verdict.margin:
        stance = "contradicts"
    verdict = replace(verdict, stance=stance)
    return replace(verdict, reproduction=_reproduction(verdict))


def _reproduction(verdict: Verdict) -> str:
    """Only ImageNet can reproduce a number that was measured on ImageNet."""
    part = verdict.part
    if verdict.profile != "imagenet":
        return ""
    if verdict.stance == "contradicts":
        return "not reproduced"
    if verdict.stance != "supports" or part.paper is None or verdict.ours is None:
        return ""
    _, low, high = verdict.ours
    slack = statistics.CHART_ERROR if part.paper_confidence == "read-chart" and part.kind != "ratio" else 0.0
    return "reproduced" if low - slack <= part.paper <= high + slack else ""
