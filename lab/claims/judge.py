"""How a claim is judged: the label of a part, and what a claim's parts say together.

What is judged is fixed beforehand in the ledger (`lab.claims.ledger`, `outputs/paper/claims.toml`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from lab.claims import statistics
from lab.claims.ledger import PILOT, PUBLIC, Check, Part, ledger
from lab.claims.statistics import CHART_ERROR
from vitlib.errors import UsageError
from vitlib.stats import Estimate, difference, interval

# The labels of a part; three kinds of them carry numbers.
SAME, OPPOSITE, LEVEL, NOT_WORSE = "same direction", "opposite direction", "level within", "not worse by"
DIFFERENT, BETTER, WORSE = "different by", "better by", "worse by"
EXACT, FAILS, UNDECIDED, NOT_RUN = "exact", "fails", "undecided", "not run"
CHECK_FAILED, OUT_OF_SCOPE, SMOKE = "check failed", "out of scope at this scale", "not judged at smoke"
AGREES, OUTSIDE, NO_REFERENCE = "as the reference", "outside the reference's prediction", "no reference yet"

PREDICTED = {"exact": EXACT, "superiority": SAME, "ratio": SAME, "equivalence": LEVEL, "non-inferiority": NOT_WORSE}
# What a claim's parts say together, below ImageNet's scale and there.
HELD, NOT_HELD, OPEN = "held here", "did not hold here", "undecided here"
EXPLORATORY, COUNTED = "exploratory", "counted"
AT_IMAGENET = {HELD: "supports", NOT_HELD: "contradicts", OPEN: "open"}
NOT_JUDGED = (CHECK_FAILED, OUT_OF_SCOPE)  # measured, but no label at any margin
MARGINS = (0.3, 0.5, 1.0, 1.5)  # of the table that shows how labels move


def label(part: Part, estimate: Estimate, m: float | None = None) -> str:
    """The label of an estimate (of a ratio, of its logarithm) by the part's kind of test, at margin m (None: the part's)."""
    m = part.margin if m is None else m
    low, high = estimate.bounds(0.95)
    level = m is not None and statistics.tightest(estimate) < m
    if part.kind in ("superiority", "ratio"):
        if low > 0 or high < 0:
            return SAME if low > 0 else OPPOSITE
        return f"{LEVEL} {m:g}" if level else UNDECIDED
    if part.kind == "non-inferiority":
        if estimate.bounds(0.90)[0] > -m:
            return f"{NOT_WORSE} {m:g}"
        return f"{WORSE} {-high:.2f} to {-low:.2f}" if high < 0 else UNDECIDED
    if level:
        return f"{LEVEL} {m:g}"
    if low > 0 or high < 0:
        if part.contrary == "both":
            return f"{DIFFERENT} {low:+.2f} to {high:+.2f}"
        return f"{BETTER} {low:.2f} to {high:.2f}" if low > 0 else f"{WORSE} {-high:.2f} to {-low:.2f}"
    return UNDECIDED


def is_predicted(part: Part, word: str) -> bool:
    return word.startswith(PREDICTED[part.kind])


def is_contrary(part: Part, word: str) -> bool:
    return word.startswith((OPPOSITE, DIFFERENT, WORSE, FAILS))


def outcome(part: Part, word: str) -> str:
    """Which of a part's sentences a label calls for: predicted, contrary, level, undecided; "" where nothing was judged."""
    if is_predicted(part, word):
        return "predicted"
    if is_contrary(part, word):
        return "contrary"
    return "level" if word.startswith(LEVEL) else "undecided" if word.startswith((UNDECIDED, BETTER)) else ""


def passes(check: Check, correct: Mapping[str, np.ndarray]) -> bool:
    """Whether a check's contrast lies above its bound, over the seeds that all its arms have."""
    n = min(len(correct[arm]) for arm in check.contrast)
    estimate = interval(difference({arm: correct[arm][:n] for arm in check.contrast}, check.contrast))
    return estimate.bounds(0.95 if check.above == 0 else 0.90)[0] > check.above


@dataclass(frozen=True)
class Verdict:
    """What is said about one part at one profile."""

    part: Part  # as it is at the profile
    profile: str
    label: str
    estimate: Estimate | None = None
    p: float | None = None  # of the predicted label
    p_holm: float | None = None  # over the primary parts
    checks: Mapping[str, bool] = field(default_factory=dict)
    note: str = ""
    runs: tuple[str, ...] = ()  # the hashes of the runs that it was read from
    source: str = ""  # "pilot" where the second study has no runs

    @property
    def ours(self) -> tuple[float, float, float] | None:
        """Mean, low, high of the 95 % interval, in points or as a ratio."""
        if self.estimate is None:
            return None
        values = (self.estimate.mean, self.estimate.low, self.estimate.high)
        return tuple(map(math.exp, values)) if self.part.kind == "ratio" else values

    @property
    def contains_paper(self) -> str:
        """Whether our interval contains the paper's value: yes, no, or too wide to say (it would contain a difference of 2 m)."""
        part = self.part
        if self.ours is None or part.paper is None:
            return ""
        _, low, high = self.ours
        slack = CHART_ERROR if part.paper_confidence == "read-chart" and part.kind != "ratio" else 0.0
        if not low - slack <= part.paper <= high + slack:
            return "no"
        return "too wide to say" if part.margin and high - low > 2 * part.margin else "yes"

    @property
    def times_paper(self) -> float | None:
        """Our difference over the paper's, where one was found: a ratio of 10 is a warning about the scale."""
        found = self.label.startswith((SAME, OPPOSITE, DIFFERENT, BETTER, WORSE)) and self.part.kind != "ratio"
        return self.estimate.mean / self.part.paper if found and self.part.paper else None

    @property
    def sentence(self) -> str:
        """The ledger's sentence for this outcome; the pilot has none."""
        return "" if self.source == PILOT else self.part.says.get(outcome(self.part, self.label), "")


def judge(
    part: Part, profile: str, correct: Mapping[str, np.ndarray], classes: int, bracketed: Mapping[str, bool]
) -> Verdict:
    """The verdict on a part that is measured in points, before Holm's correction.

    part: as it is at the profile. correct: arm -> (S, N) bool of the part's own seeds; an arm of a check may have fewer.
    bracketed: arm -> whether its rate has a worse one on each side; arms that were not tuned are absent.
    """
    estimate = interval(difference({arm: correct[arm] for arm in part.contrast}, part.contrast))
    # Neither floor nor ceiling: at least twice chance, an error of at least 5 %. Large models are what they are.
    inside = all(2 / classes <= correct[arm].mean() <= 0.95 for arm in part.contrast)
    checks = {"learned": inside or profile in ("imagenet", PUBLIC)}
    checks |= {f"rate of {arm} bracketed": held for arm, held in bracketed.items()}
    checks |= {check.name: passes(check, correct) for check in part.checks}
    failed = [name for name, passed in checks.items() if not passed]
    word = label(part, estimate)
    if profile in part.out_of_scope:
        word = OUT_OF_SCOPE
    elif failed:
        word = f"{CHECK_FAILED}: {', '.join(failed)}"
    p = statistics.p_value(part.kind, estimate, part.margin)
    return Verdict(part, profile, word, estimate, p, checks=checks)


def ratio(part: Part, profile: str, estimate: Estimate, device: str) -> Verdict:
    """The verdict on a ratio of times from the estimate of its logarithm."""
    p = statistics.p_value(part.kind, estimate, None)
    return Verdict(part, profile, label(part, estimate), estimate, p, note=f"on {device}")


def replicated(verdict: Verdict, reference: Verdict | None) -> Verdict:
    """A reader's own estimate beside the reference's: inside of its prediction interval or not; no label of its own.

    A ratio of times belongs to its machine and is compared with no other's; a part that failed a check stays so.
    """
    if verdict.estimate is None or verdict.part.kind == "ratio" or verdict.label.startswith(CHECK_FAILED):
        return verdict
    if reference is None or reference.estimate is None or reference.source == PILOT:
        return replace(verdict, label=NO_REFERENCE)
    mean, n = verdict.estimate.mean, verdict.estimate.n
    low, high = statistics.prediction(reference.estimate, n)
    note = f"the reference, {reference.estimate.mean:+.2f}, predicts {low:+.2f} to {high:+.2f} for {n} seeds"
    return replace(verdict, label=AGREES if low <= mean <= high else OUTSIDE, note=note)


def corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """With Holm's correction over all primary parts: one that is not run or failed a check counts as p = 1.

    A primary part keeps its predicted label only if its corrected p is at most 0.05.
    """
    primary = [v for v in verdicts if v.part.primary]
    there = [v.p if outcome(v.part, v.label) and v.p is not None and v.source != PILOT else 1.0 for v in primary]
    adjusted = {v.part.id: float(q) for v, q in zip(primary, statistics.holm(there), strict=True)}
    result = []
    for v in verdicts:
        if v.part.primary and v.estimate is not None and v.source != PILOT:
            v = replace(v, p_holm=adjusted[v.part.id])
            if is_predicted(v.part, v.label) and v.p_holm > 0.05:
                v = replace(v, label=UNDECIDED, note=f"{v.label} without Holm's correction")
        result.append(v)
    return result


def claim_verdict(verdicts: Sequence[Verdict]) -> str:
    """What all parts of one claim say together at one profile.

    A contrary label counts after Holm's correction within the claim, over its parts' two-sided p against 0. Where the
    parts are not judged (`smoke`), or only laid beside the reference (`cpu`), the claim says that and no more.
    """
    trained = [v for v in verdicts if v.part.kind != "exact"]
    if not trained:
        return NOT_HELD if any(v.label == FAILS for v in verdicts) else COUNTED
    if not any(v.part.primary for v in trained):
        return EXPLORATORY
    for word in (SMOKE, OUTSIDE, NO_REFERENCE, AGREES):
        if any(v.label == word for v in trained):
            return word
    mine = [v for v in trained if v.source != PILOT and v.label != OUT_OF_SCOPE]
    two_sided = [
        statistics.p_value("superiority", v.estimate, None) if is_contrary(v.part, v.label) else 1.0 for v in mine
    ]
    if any(q <= 0.05 for q in statistics.holm(two_sided)):
        word = NOT_HELD
    elif mine and all(is_predicted(v.part, v.label) for v in mine):
        word = HELD
    else:
        word = OPEN
    return AT_IMAGENET[word] if mine and mine[0].profile == "imagenet" else word


def moved(verdicts: Sequence[Verdict], margins: Sequence[float] = MARGINS) -> pd.DataFrame:
    """How labels move: each measured part at several margins, before Holm's correction; what was not judged stays so.

    Raises UsageError for a margin that is no number above 0.
    """
    if wrong := [m for m in margins if not 0 < m < math.inf]:
        raise UsageError(f"a margin is {wrong[0]}: allowed are percentage points above 0")
    margins = sorted({*margins})
    measured = [v for v in verdicts if v.estimate is not None and v.part.margin is not None]
    rows = [
        {"part": v.part.id, "margin": v.part.margin, "tightest": statistics.tightest(v.estimate)}
        | {f"at {m:g}": v.label if v.label.startswith(NOT_JUDGED) else label(v.part, v.estimate, m) for m in margins}
        for v in measured
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["part", "margin", "tightest", *(f"at {m:g}" for m in margins)])


# Columns of the claims table. sd, seed_se, image_se: in points, of a ratio of its logarithm.
TEXTS = ("part", "claim", "claim_title", "claim_verdict", "title", "notebook", "primary", "contrast", "test")
COLUMNS = dict.fromkeys(TEXTS, object) | {
    "n": "Int64", "test_images": "Int64",
    **dict.fromkeys(("ours", "sd", "low", "high", "seed_se", "image_se", "paired_low", "paired_high", "paper"), float),
    **dict.fromkeys(("paper_source", "paper_confidence", "contains_paper"), object),
    **dict.fromkeys(("times_paper", "margin", "tightest", "p", "p_holm"), float),
    **dict.fromkeys(("checks", "label", "says"), object),
    "smallest_visible": float, "seeds_needed": object,  # a number or words
    **dict.fromkeys(("power", "note", "source", "runs"), object),
}  # fmt: skip


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per verdict, numbers not rounded, with what all parts of its claim say together."""
    table = pd.DataFrame([_row(v) for v in verdicts], columns=list(COLUMNS)).astype(COLUMNS)
    words = {claim: claim_verdict([v for v in verdicts if v.part.claim == claim]) for claim in {*table["claim"]}}
    titles = ledger().claims
    return table.assign(claim_title=table["claim"].map(titles), claim_verdict=table["claim"].map(words))


def _row(v: Verdict) -> dict[str, object]:
    part, e = v.part, v.estimate
    signs = {
        arm: f"{'-' if c < 0 else '+'} {'' if abs(c) == 1 else f'{abs(c):.3g} '}" for arm, c in part.contrast.items()
    }
    row = {
        "part": part.id, "claim": part.claim, "title": part.title, "notebook": part.notebook, "primary": part.primary,
        "contrast": " ".join(sign + arm for arm, sign in signs.items()).removeprefix("+ "), "test": part.kind,
        "paper": part.paper, "paper_source": part.paper_source, "paper_confidence": part.paper_confidence,
        "contains_paper": v.contains_paper, "times_paper": v.times_paper, "margin": part.margin, "p": v.p, "p_holm": v.p_holm,
        "checks": "; ".join(f"{name}: {'passed' if passed else 'failed'}" for name, passed in v.checks.items()),
        "label": v.label, "says": v.sentence, "power": part.power, "note": v.note, "source": v.source,
        "runs": " ".join(v.runs),
    }  # fmt: skip
    if e is None:
        return row
    mean, low, high = v.ours
    seen, ratio = statistics.smallest_visible(e), part.kind == "ratio"
    return row | {
        "n": e.n, "test_images": e.images if e.images > 1 else None, "ours": mean, "sd": e.sd, "low": low, "high": high,
        "seed_se": math.sqrt(e.seed_term), "image_se": math.sqrt(e.image_term), "tightest": statistics.tightest(e),
        "paired_low": e.paired[0], "paired_high": e.paired[1], "smallest_visible": math.exp(seen) if ratio else seen,
        "seeds_needed": None if ratio or not part.paper else statistics.seeds_needed(e, part.paper),
    }  # fmt: skip
