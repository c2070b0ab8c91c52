"""The rules of judging: the interval, labels and checks, Holm's corrections, what voids a run, the ledger, the search for rates."""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import minimize
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from lab import paths
from lab.claims import evidence, exact, judge, ledger, statistics, tuning
from lab.claims.evidence import Evidence
from lab.claims.ledger import PROFILES
from lab.experiments import profiles
from lab.runs import results
from lab.runs.results import Archive, Result
from vitlib.errors import UsageError
from vitlib.stats import Estimate, difference, interval, over_seeds

LEDGER = ledger.ledger()
PILOT = paths.REFERENCE / "pilot"
TRAINED = [part for part in LEDGER.parts.values() if part.kind not in ("exact", "ratio")]
PRIMARY = ("A1", "F1", "F2-full", "H4-linear", "H8-retention")
IMAGES = 8000
COMMIT = "0123456789ab"


# ---- made-up runs


def spread(n: int, sd: float) -> np.ndarray:
    """n values with mean 0 and this sample standard deviation, like those of a normal distribution."""
    z = stats.norm.ppf((np.arange(n) + 0.5) / n)
    return sd * z / np.std(z, ddof=1)


def planted(points: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """arm -> (S, IMAGES) bool: accuracies about 70 %, with differences of so many points, seed by seed, to 1 / 80 of a point.

    The images whose answers differ between arms are others in each seed: the image term is 0, and the interval is that of
    Student's t over seeds.
    """
    made = {}
    for arm, of_arm in points.items():
        right = np.tile(np.arange(IMAGES) % 10 < 7, (len(of_arm), 1))
        width = IMAGES // len(of_arm)
        for s, value in enumerate(of_arm):
            count = 3 * width // 5 + round(value * IMAGES / 100)
            assert 0 <= count <= width, "so many points do not fit"
            right[s, s * width : (s + 1) * width] = np.arange(width) < count
        made[arm] = right
    return made


def good_curves(name: str) -> dict[str, dict[float, dict[int, float]]]:
    """A curve for every rate of the ledger: the chosen one is the best, with a worse one on each side."""
    rates = {}
    for arms in LEDGER.recipes.get(name, {}).values():
        for recipe in arms.values():
            rates |= recipe["rates"]
    worse = {lr: 75.0 + 0.1 * lr for lr in (1000, 1001)}
    return {r: {lr / 2: worse, lr: {s: v + 5 for s, v in worse.items()}, 2 * lr: worse} for r, lr in rates.items()}


@functools.cache
def stamps(name: str) -> dict[str, str]:
    return LEDGER.stamps(name)


class Planted:
    """A source of verdicts, as `evidence.Stored` is: finished runs with these answers, (notebook, arm) -> bool (S, N)."""

    def __init__(
        self, arms: Mapping[tuple[str, str], np.ndarray], name: str = "study", fixed=LEDGER, **changed: object
    ):
        self.arms, self.name, self.ledger = arms, name, fixed
        self.tried = changed.pop("tried", None) or good_curves(name)
        self.changed = {"commit": COMMIT, "stamps": {}, "record": None, "seeds": None} | changed

    def holds(self, part) -> bool:
        return True

    def ratio(self, part):
        return None, "needs a GPU"

    def runs(self, number: str, label: str) -> tuple[list[Evidence], str]:
        found, changed = [], self.changed
        record = changed["record"] or LEDGER.recipes[self.name][number][label]["record"]
        seeds = changed["seeds"] or profiles.PROFILES[self.name].seeds
        for seed, right in zip(seeds, self.arms.get((number, label), ()), strict=False):
            about = dict.fromkeys(results.ABOUT, "x") | {"commit": changed["commit"], "began": "2026-12-01T00:00:00Z"}
            result = Result(
                f"{label}-{seed}".replace(" ", "-"),
                {"top1": 100 * right.mean()},
                right,
                stamps(self.name) | changed["stamps"],
                about,
            )
            found.append(Evidence(result, seed, record, [result], "data"))
        return found, ""


# What passes the checks of every part that is asked for: offsets in points, by arm
PASSING = {
    "12x1+LS": 0.0, "6x2+LS": 0.0, "36x1+LS": 1.0, "18x2+LS": 1.0, "12x1": -1.0, "6x2": -1.0, "36x1": 0.0, "18x2": 0.0,
    "full, fewer steps": -1.0, "linear scratch 500": -2.0, "digits 100 scratch": -1.0,
}  # fmt: skip


def source(
    id: str, points: Mapping[str, float | Sequence[float]] = {}, sd: float = 0.1, name: str = "study", fixed=LEDGER,
    **changed: object,
) -> Planted:  # fmt: skip
    """The runs that one part reads, all its checks passed unless `points` says otherwise; the first arm has the noise."""
    part = LEDGER.part(id)
    here, n, values = part.at_profile(name), part.n[name], {}
    for i, arm in enumerate(here.arms):
        base = arm.partition(", subset")[0]
        value = points.get(arm, points.get(base, PASSING.get(base, 0.0)))
        noise = np.zeros(n)
        if base == next(iter(here.contrast)).partition(", subset")[0]:
            noise = spread(n, sd)
        elif arm not in here.contrast:
            noise = np.random.default_rng(i).permutation(spread(n, 0.1))
        values[arm] = np.asarray(value) + (noise if np.ndim(value) == 0 else 0)
    return Planted({(part.notebook, arm): right for arm, right in planted(values).items()}, name, fixed, **changed)


def verdict(id: str, points: Mapping[str, float] = {}, sd: float = 0.1, name: str = "study", **changed: object):
    made = source(id, points, sd, name, **changed)
    return evidence.verdict(made, made.ledger.part(id))


def by_seed(made: Planted, id: str) -> np.ndarray:
    """The contrast of each seed in points, by plain arithmetic."""
    here = made.ledger.part(id).at_profile(made.name)
    return sum(c * 100 * made.arms[here.notebook, arm].mean(axis=1) for arm, c in here.contrast.items())


# ---- labels


@pytest.mark.parametrize(
    ("id", "points", "sd", "name", "label"),
    [
        ("P2-1", {"18x2": 1.0}, 0.5, "study", "same direction"),
        ("P2-1", {"18x2": -1.0}, 0.5, "study", "opposite direction"),
        ("P2-1", {"18x2": 0.1}, 0.5, "study", "level within 0.5"),
        ("P2-1", {"18x2": 0.3}, 0.3, "study", "same direction"),  # within the margin too: a difference comes first
        ("P2-1", {"18x2": 0.4}, 1.0, "study", "undecided"),
        ("P2-1", {"18x2": 0.1}, 0.5, "imagenet", "undecided"),  # n = 5, m = 0.3
        ("A1", {"6x2+LS": 0.0}, 0.5, "study", "level within 0.5"),
        ("A1", {"6x2+LS": 0.3}, 0.2, "study", "level within 0.5"),  # beyond 0 too: within the margin comes first
        ("A1", {"6x2+LS": -0.3}, 0.2, "study", "level within 0.5"),
        ("A1", {"6x2+LS": 0.35}, 0.8, "study", "undecided"),
        ("H6-supervised", {"hmlp supervised": 0.1}, 0.1, "imagenet", "level within 0.3"),
        ("H6-supervised", {"hmlp supervised": 0.3}, 0.8, "imagenet", "undecided"),
        ("F5-digits", {"digits 100 attn": 1.0}, 0.5, "study", "not worse by 0.5"),
        ("F5-digits", {"digits 100 attn": -0.2}, 0.5, "study", "not worse by 0.5"),
        ("F5-digits", {"digits 100 attn": -0.4}, 1.0, "study", "undecided"),
        ("H4-stems", {"linear pretrained": -0.5}, 0.5, "study", "not worse by 1"),
        ("P4", {"18x2": 1.0}, 0.5, "study", "same direction"),
        ("P4", {"6x2": 0.5}, 0.5, "study", "opposite direction"),
        ("P4", {"18x2": 0.1}, 0.3, "study", "level within 0.5"),
        ("H8-retention", {"conv pretrained": -1.0}, 1.0, "study", "same direction"),
        ("H8-retention", {"conv supervised": -1.0}, 1.0, "study", "opposite direction"),
        ("H8-retention", {"conv pretrained": -0.2}, 1.0, "study", "level within 1"),
        ("H9", {"conv blanked pretrained": 0.5}, 0.3, "study", "same direction"),
    ],
)  # fmt: skip
def test_a_planted_difference_gets_its_label(id, points, sd, name, label):
    found = verdict(id, points, sd, name)
    assert found.label == label, (found.label, found.note, found.checks)
    assert found.checks and all(found.checks.values())


NUMBERED = [
    ("H6-supervised", {"hmlp supervised": 1.0}, "imagenet", "different by {low:+.2f} to {high:+.2f}"),
    ("H6-supervised", {"hmlp supervised": -1.0}, "imagenet", "different by {low:+.2f} to {high:+.2f}"),
    ("A1", {"6x2+LS": 1.0}, "study", "better by {low:.2f} to {high:.2f}"),
    ("A1", {"6x2+LS": -1.0}, "study", "worse by {least:.2f} to {most:.2f}"),
    ("P5", {"18x2+LS": 2.0}, "study", "better by {low:.2f} to {high:.2f}"),
    ("P5", {"18x2+LS": 0.0}, "study", "worse by {least:.2f} to {most:.2f}"),
    ("F1", {"attn": 1.0}, "study", "better by {low:.2f} to {high:.2f}"),
    ("F1", {"attn": -1.0}, "study", "worse by {least:.2f} to {most:.2f}"),
    ("F5-digits", {"digits 100 attn": -1.0}, "study", "worse by {least:.2f} to {most:.2f}"),
    ("H4-stems", {"linear pretrained": -2.0}, "study", "worse by {least:.2f} to {most:.2f}"),
]


@pytest.mark.parametrize(("id", "points", "name", "form"), NUMBERED)
def test_the_numbers_of_a_label_are_the_ends_of_the_95_percent_interval(id, points, name, form):
    made = source(id, points, 0.2, name)
    d = by_seed(made, id)
    low, high = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
    found = evidence.verdict(made, LEDGER.part(id))
    assert found.label == form.format(low=low, high=high, least=-high, most=-low)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((low, high), rel=1e-3)
    assert judge.is_contrary(found.part, found.label) == ("better" not in form)
    assert judge.outcome(found.part, found.label) == ("undecided" if "better" in form else "contrary")


@pytest.mark.parametrize(
    ("id", "there", "back"),
    [
        ("P2-1", "same direction", "opposite direction"), ("F2-full", "same direction", "opposite direction"),
        ("A1", "better by", "worse by"), ("F1", "better by", "worse by"), ("H4-linear", "same direction", "opposite direction"),
        ("F5-digits", "not worse by 0.5", "worse by"), ("H3-conv", "better by", "worse by"),
    ],
)  # fmt: skip
def test_swapping_two_arms_turns_the_label(id, there, back):
    part = LEDGER.part(id)
    one, other = part.contrast
    apart = 1.5 if part.margin == 1.0 else 0.8
    made = source(id, {one: apart if id in ("A1", "F1", "F5-digits", "H3-conv") else 0.3, other: 0.0}, sd=0.1)
    swapped = {one: other, other: one}
    arms = {}
    for (number, arm), right in made.arms.items():
        base, comma, subset = arm.partition(", subset")
        arms[number, swapped.get(base, base) + comma + subset] = right
    turned = evidence.verdict(Planted(arms), part)
    first = evidence.verdict(made, part)
    assert first.label.startswith(there), (first.label, first.checks)
    # the control of F2 and F1 has an arm of the contrast: it stays passed
    assert turned.label.startswith(back), (turned.label, turned.checks)
    assert turned.estimate.mean == pytest.approx(-first.estimate.mean)
    assert (turned.estimate.low, turned.estimate.high) == pytest.approx((-first.estimate.high, -first.estimate.low))


def touching(level: float, end: int, bound: float) -> Estimate:
    """An estimate whose interval at a level ends at `bound` to the last bit."""
    mean = bound - Estimate(0.0, (0.2, 0.0, 0.0), 5, 1).bounds(level)[end]
    for step in np.arange(-50, 51):
        estimate = Estimate(mean + step * np.spacing(mean), (0.2, 0.0, 0.0), 5, 1)
        if estimate.bounds(level)[end] == bound:
            return estimate
    raise AssertionError("no such estimate")


@pytest.mark.parametrize(
    ("kind", "level", "end", "bound"),
    [
        ("superiority", 0.95, 0, 0.0), ("superiority", 0.95, 1, 0.0), ("ratio", 0.95, 0, 0.0), ("ratio", 0.95, 1, 0.0),
        ("non-inferiority", 0.90, 0, -0.5), ("non-inferiority", 0.95, 1, 0.0),
    ],
)  # fmt: skip
def test_an_interval_that_touches_a_bound_is_undecided(kind, level, end, bound):
    part = replace(LEDGER.part("F5-digits"), kind=kind, margin=None if kind == "ratio" else 0.5)
    estimate = touching(level, end, bound)
    assert judge.label(part, estimate) == "undecided"
    beyond = 1e-9 if end == 0 else -1e-9
    assert judge.label(part, replace(estimate, mean=estimate.mean + beyond)) != "undecided"


@pytest.mark.parametrize("sign", [1, -1])
def test_an_equivalence_that_touches_its_margin_or_0_is_not_level_and_not_different(sign):
    part = replace(LEDGER.part("A1"), contrary="both", margin=0.8)
    end = 1 if sign > 0 else 0
    wide = touching(0.90, end, 0.8 * sign)  # crosses 0, so that it is not different either
    assert wide.bounds(0.95)[1 - end] * sign < 0
    assert judge.label(part, wide) == "undecided"
    assert judge.label(part, replace(wide, mean=wide.mean - sign * 1e-9)) == "level within 0.8"
    assert judge.label(part, touching(0.95, 1 - end, 0.0), m=0.1) == "undecided"
    assert judge.label(part, touching(0.95, 1 - end, 0.0), m=5.0) == "level within 5"


@pytest.mark.parametrize("id", ["A1", "P5", "F1"])
def test_only_worse_is_contrary_to_equal_accuracy(id):
    part = LEDGER.part(id)
    assert part.contrary == "worse"
    better, worse = (judge.label(part, over_seeds([sign * x for x in (1.9, 2.0, 2.1)])) for sign in (1, -1))
    assert (better[:9], worse[:8]) == ("better by", "worse by")
    assert (judge.is_contrary(part, better), judge.is_contrary(part, worse)) == (False, True)
    said = [judge.Verdict(part, "study", word).sentence for word in (better, worse)]
    assert said == [part.says["undecided"], part.says["contrary"]]


def test_every_label_belongs_to_one_outcome_and_what_was_not_judged_to_none():
    outcomes = {
        ("superiority", "same direction"): "predicted", ("superiority", "opposite direction"): "contrary",
        ("superiority", "level within 0.5"): "level", ("superiority", "undecided"): "undecided",
        ("ratio", "same direction"): "predicted", ("ratio", "opposite direction"): "contrary",
        ("equivalence", "level within 0.5"): "predicted", ("equivalence", "different by +0.10 to +0.20"): "contrary",
        ("equivalence", "better by 0.10 to 0.20"): "undecided", ("equivalence", "worse by 0.10 to 0.20"): "contrary",
        ("non-inferiority", "not worse by 0.5"): "predicted", ("non-inferiority", "worse by 0.10 to 0.20"): "contrary",
        ("exact", "exact"): "predicted", ("exact", "fails"): "contrary",
    }  # fmt: skip
    for (kind, word), outcome in outcomes.items():
        assert judge.outcome(replace(LEDGER.part("A1"), kind=kind), word) == outcome, (kind, word)
    for part in LEDGER.parts.values():
        for word in ("not run", "check failed: learned", "out of scope at this scale", "not judged at smoke"):
            assert judge.outcome(part, word) == "" and not judge.is_contrary(part, word)


def test_ratios_and_counts_have_their_labels():
    part = LEDGER.part("F3-time")
    for seconds, label in (((1.2, 1.21, 1.19), "same direction"), ((0.8, 0.81, 0.79), "opposite direction"), ((0.7, 1.0, 1.5), "undecided")):  # fmt: skip
        found = judge.ratio(part, "study", over_seeds(np.log(seconds)), "2 cores, a case")
        assert (found.label, found.note) == (label, "on 2 cores, a case")
        assert found.ours[0] == pytest.approx(stats.gmean(seconds)) and found.ours[1] < found.ours[0] < found.ours[2]
        assert found.ours[1:] == pytest.approx(
            np.exp(stats.t.interval(0.95, 2, np.log(seconds).mean(), stats.sem(np.log(seconds))))
        )
        assert found.times_paper is None
    for name in ("smoke", *PROFILES):
        made = Planted({}, name)
        for part in LEDGER.parts.values():
            if part.kind == "exact":
                assert evidence.verdict(made, part).label == "exact"
    made.holds = lambda part: False
    assert evidence.verdict(made, LEDGER.part("H2-ln")).label == "fails"


def test_what_is_counted_is_counted_to_the_last_bit():
    assert exact.exact_holds("0", 0.0) and not exact.exact_holds("0", 1e-12)
    assert exact.exact_holds("not 0", 1e-12) and not exact.exact_holds("not 0", 0.0)
    assert not exact.exact_holds("not 0", math.nan) and not exact.exact_holds("not 0", math.inf)
    assert statistics.prints_as(17.583, "17.58") and not statistics.prints_as(17.583, "17.59")
    assert statistics.prints_as(256.7, "257")
    assert exact.p1_holds() and exact.f4_holds() and exact.h1_holds()  # the others: tests of the report and of costs


def test_no_trained_part_is_judged_at_smoke_or_where_it_is_not_measured():
    for part in TRAINED:
        assert evidence.verdict(Planted({}, "smoke"), part).label == "not judged at smoke"
        for name in {*PROFILES} - {*part.n, *(["study"] if "pilot" in part.n else [])}:
            found = evidence.verdict(Planted({}, name), part)
            assert found.label == "not run" and found.note.startswith("measured at profile "), part.id
    assert evidence.verdict(Planted({}, "cpu"), LEDGER.part("P7-S1")).note == "needs a GPU"


def test_out_of_scope_shows_the_estimate_and_judges_nothing():
    for id in ("F6-fashion-mnist-4", "F6-digits", "F6-animal-shapes"):
        found = evidence.verdict(Planted({}), LEDGER.part(id))
        assert (found.label, found.source) == ("out of scope at this scale", "pilot")
        assert found.estimate.n == 5 and found.sentence == ""
    part = replace(LEDGER.part("P2-1"), out_of_scope=("study",))
    right = {"18x2": planted({"a": spread(10, 0.1) + 2})["a"], "36x1": planted({"a": np.zeros(10)})["a"]}
    assert judge.judge(part, "study", right, 10, {}).label == "out of scope at this scale"
    assert judge.judge(part, "imagenet", right, 10, {}).label == "same direction"


def test_a_part_that_is_not_run_again_shows_the_pilots_estimate_under_todays_labels():
    kept, archive = pd.read_csv(PILOT / "claims.csv", index_col="part"), Archive(PILOT)
    parts = [part for part in TRAINED if "pilot" in part.n and "study" not in part.n]
    assert {part.id for part in parts} >= {
        "P2-3",
        "P2-4",
        "P3",
        "P6-seq",
        "P6-par",
        "F5-animal-shapes",
        "H6-supervised",
    }
    for part in parts:
        assert not part.primary
        found = evidence.verdict(Planted({}), part)
        assert (found.source, found.profile, found.estimate.n) == ("pilot", "study", 5) and "pilot" in found.note
        assert part.id == "P3" or found.estimate.mean == pytest.approx(kept.loc[part.id, "ours"])
        arms = archive.results(part.notebook)
        assert set(found.runs) == {r.hash for arm in part.at_profile("pilot").contrast for r in arms[arm]}
    # the pilot's slope was that of a line on log2 of the width: the same, written as one contrast
    assert evidence.pilot(LEDGER.part("P3")).estimate.mean == pytest.approx(kept.loc["P3", "ours"], abs=1e-4)


# ---- checks


@pytest.mark.parametrize(
    ("id", "points", "failed"),
    [
        ("A1", {"36x1+LS": -1.0}, "control: 36 pairs beat 12"),
        ("P5", {"36x1+LS": 0.0, "18x2+LS": 0.0}, "control: 36 pairs beat 12"),
        ("P4", {"12x1": 0.0, "6x2": 0.0}, "premise: 36 pairs beat 12 without LayerScale"),
        ("F1", {"full, fewer steps": 0.0}, "control: all steps beat fewer"),
        ("F2-full", {"full, fewer steps": 0.5}, "control: all steps beat fewer"),
        ("F2-attn", {"full, fewer steps": 0.0}, "control: all steps beat fewer"),
        ("F5-digits", {"digits 100 scratch": 0.0}, "premise: the pretrained model helps"),
        *((id, {"linear scratch 500": 0.0, "linear pretrained 500": 0.0}, "control: pre-training helps on few labels")
          for id in ("H3-conv", "H4-linear", "H4-conv", "H4-stems", "H8-retention", "H9")),
        ("H4-linear", {"hmlp supervised": -1.5}, "hMLP not below linear with labels alone by m"),
    ],
)  # fmt: skip
def test_a_check_that_fails_is_named_and_nothing_is_judged(id, points, failed):
    found = verdict(id, points)
    assert found.label == f"check failed: {failed}" and found.checks[failed] is False
    assert [name for name, passed in found.checks.items() if not passed] == [failed]
    assert found.sentence == "" and found.estimate is not None and not judge.is_predicted(found.part, found.label)


def test_a_control_has_to_be_significant_and_may_have_fewer_seeds():
    """A difference that is there, but not significant over the control's own ten seeds, is not seen."""
    for gap, sd, passed in ((0.5, 0.5, True), (0.5, 1.0, False), (0.05, 0.05, True)):
        lower = {"6x2+LS": -0.5, "12x1+LS": -0.5, "36x1+LS": [*(gap - 0.5 + spread(10, sd)), *np.full(10, 1.5)]}
        made = source("A1", lower)
        assert (stats.ttest_1samp(gap + spread(10, sd), 0).pvalue < 0.05) == passed
        assert evidence.verdict(made, LEDGER.part("A1")).label == (
            "level within 0.5" if passed else "check failed: control: 36 pairs beat 12"
        )


def test_hmlp_may_be_below_linear_with_labels_alone_but_not_by_the_margin_one_sided_at_5_percent():
    for mean in (-0.5, -0.7, -0.8, -0.9):
        d = mean + spread(20, 0.5)
        below = stats.ttest_1samp(d, -1.0, alternative="greater").pvalue >= 0.05
        found = verdict("H4-linear", {"hmlp supervised": d, "linear supervised": np.zeros(20)})
        assert found.checks["hMLP not below linear with labels alone by m"] == (not below), mean
    assert below  # the last one fails


def test_arms_at_floor_or_ceiling_have_learned_nothing():
    part = replace(LEDGER.part("P2-1"), checks=())
    rng = np.random.default_rng(0)
    for low, high, passed in ((0.19, 0.5, False), (0.21, 0.5, True), (0.5, 0.96, False), (0.5, 0.94, True)):
        right = {"18x2": rng.random((10, 4000)) < high, "36x1": rng.random((10, 4000)) < low}
        assert judge.judge(part, "study", right, 10, {}).checks["learned"] == passed
        assert judge.judge(part, "study", right, 10, {}).label == (
            "same direction" if passed else "check failed: learned"
        )
        assert judge.judge(part, "imagenet", right, 10, {}).label == "same direction"
    # all images right, and none
    right = {arm: np.ones((10, 100), bool) for arm in part.contrast}
    assert judge.judge(part, "study", right, 10, {}).label == "check failed: learned"
    assert judge.judge(part, "study", {arm: ~r for arm, r in right.items()}, 10, {}).label == "check failed: learned"


def write_tuning(folder, curves) -> None:
    rows = [
        {"rate_of": name, "lr": lr, **{f"seed_{s}": top1.get(s) for s in tuning.SEEDS}}
        for name, curve in curves.items() for lr, top1 in curve.items()
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "tuning.csv", index=False)


@pytest.mark.parametrize("cut", ["highest", "lowest", "curve", "another"])
def test_a_grid_of_rates_that_is_cut_off_fails_its_part(tmp_path, cut):
    curves = good_curves("study")
    ffn = curves["ffn"]
    if cut == "another":  # the best is not the rate that was trained
        best = max(ffn)
        curves["ffn"] = {lr: {s: v + 20 * (lr == best) for s, v in top1.items()} for lr, top1 in ffn.items()}
        curves["ffn"][2 * best] = dict(ffn[best])
    elif cut == "curve":
        del curves["ffn"]
    else:
        del ffn[max(ffn) if cut == "highest" else min(ffn)]
    write_tuning(tmp_path, curves)
    tried = evidence.tried(tmp_path)
    assert tried.keys() == curves.keys()
    found = verdict("F2-full", {"full": 0.5}, tried=tried)
    assert found.label == "check failed: rate of ffn bracketed" and found.checks["rate of full bracketed"]
    write_tuning(tmp_path, good_curves("study"))
    assert verdict("F2-full", {"full": 0.5}, tried=evidence.tried(tmp_path)).label == "same direction"


def test_without_a_committed_tuning_no_rate_is_bracketed(tmp_path):
    assert evidence.tried(tmp_path) == {}
    assert not evidence.bracketed({"full": 1e-3}, {})
    found = verdict("F1", tried={"none": {1.0: {1000: 50.0, 1001: 50.1}}})
    assert found.label == "check failed: rate of attn bracketed, rate of full bracketed"


def test_the_rate_of_what_an_arm_begins_with_must_be_bracketed_too():
    curves = good_curves("study")
    del curves["hmlp masked"][max(curves["hmlp masked"])]
    found = verdict("H4-linear", {"hmlp pretrained": 1.0}, tried=curves)
    assert found.label == "check failed: rate of hmlp pretrained bracketed"


def test_every_arm_that_is_judged_at_the_study_has_rates_that_were_searched():
    for number, arms in LEDGER.recipes["study"].items():
        for label, recipe in arms.items():
            wanted = {name.replace("few", "500") for name in tuning.START}
            assert recipe["rates"] and set(recipe["rates"]) <= wanted, (number, label)


# ---- what voids a run


def test_fewer_seeds_than_the_ledger_fixes_read_not_run():
    made = source("F1")
    made.arms["41", "attn"] = made.arms["41", "attn"][:19]
    found = evidence.verdict(made, LEDGER.part("F1"))
    assert (found.label, found.note, found.estimate) == ("not run", "19 of 20 seeds of attn", None)
    del made.arms["41", "full, fewer steps"]
    made.arms["41", "attn"] = made.arms["41", "full"]
    assert evidence.verdict(made, LEDGER.part("F1")).note == "0 of 20 seeds of full, fewer steps"


def test_more_seeds_than_the_ledger_fixes_are_not_read():
    made = source("P2-1", {"18x2": 1.0})
    more = {key: np.concatenate([right, ~right]) for key, right in made.arms.items()}
    assert (
        evidence.verdict(Planted(more), LEDGER.part("P2-1")).estimate
        == evidence.verdict(made, LEDGER.part("P2-1")).estimate
    )


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"stamps": {"F1": "0" * 16}}, "were not made under this entry of the ledger"),
        ({"record": "0" * 16}, "was trained by another recipe than the ledger's"),
        ({"commit": f"{COMMIT}+"}, "were made from a tree with uncommitted changes"),
        ({"seeds": range(1000, 1020)}, "are not of the seeds of profile study"),
        ({"seeds": [40] * 20}, "are not of the seeds of profile study"),
        ({"seeds": [*range(41, 60), 40]}, "are not of the seeds of profile study"),
    ],
)
def test_runs_that_were_made_otherwise_read_not_run(changed, note):
    found = verdict("F1", **changed)
    assert found.label == "not run" and note in found.note and found.estimate is None
    assert verdict("F1", stamps={"F2-full": "0" * 16}).label == "level within 0.5"  # another part's hash
    assert verdict("F1", commit="unknown").label == "level within 0.5"


def test_the_stamp_of_what_a_run_began_with_counts_too():
    made = source("F1")
    whole = made.runs

    def with_another_trunk(number, label):
        found, note = whole(number, label)
        trunk = replace(found[0].result, ledger={})
        return [replace(run, family=[trunk, *run.family]) if label == "attn" else run for run in found], note

    made.runs = with_another_trunk
    assert (
        evidence.verdict(made, LEDGER.part("F1")).note
        == "the runs of attn were not made under this entry of the ledger"
    )


def test_at_cpu_a_tree_with_changes_is_no_fault():
    assert verdict("F1", name="cpu", commit=f"{COMMIT}+").label == "level within 0.5"
    assert verdict("F1", name="cpu", stamps={"F1": "x"}).label == "not run"


def doctored(folder, block: str, old: str, new: str, file: str = "claims.toml"):
    """The ledger with one change after the header of a table."""
    for name in ("claims.toml", "recipes.toml"):
        shutil.copy(paths.PAPER / name, folder)
    text = (folder / file).read_text()
    start = text.index(f"[{block}]\n")
    assert old in text[start : start + 3000], old
    (folder / file).write_text(text[:start] + text[start:].replace(old, new, 1))
    return ledger.ledger(folder)


@pytest.mark.parametrize(
    ("file", "block", "old", "new"),
    [
        ("claims.toml", "part.F1", "margin = 0.5", "margin = 1.5"),
        ("claims.toml", "part.F1", '"attn" = 1, "full" = -1', '"full" = 1, "attn" = -1'),
        ("claims.toml", "part.F1", "study = 20", "study = 10"),
        ("claims.toml", "part.F1", '"full" = 1, "full, fewer steps" = -1', '"attn" = 1, "full, fewer steps" = -1'),
        ("claims.toml", "part.F1", '"full, fewer steps" = -1 } }]', '"full, fewer steps" = -1 }, above = -5 }]'),
        ("claims.toml", "part.F1", 'contrary = "worse"\n', ""),
        ("claims.toml", "part.F1", "primary = true\n", ""),
        ("claims.toml", "part.F1", 'kind = "equivalence"', 'kind = "non-inferiority"'),
        ("recipes.toml", "study.41.\"attn\"", "attn = 0.004", "attn = 0.008"),
        ("recipes.toml", "study.41.\"attn\"", "lr = 0.004", "lr = 0.008"),
        ("recipes.toml", "study.41.\"full\"", "epochs = 1", "epochs = 2"),
        ("recipes.toml", "study.41.\"full, fewer steps\"", "images = 3000", "images = 6000"),
        ("recipes.toml", "study.41.\"full\"", 'record = "', 'record = "0'),
        ("recipes.toml", "study.41.\"full, fewer steps\"", "n = 20", "n = 5"),
    ],
)  # fmt: skip
def test_a_ledger_that_was_changed_after_the_runs_reads_not_run(tmp_path, file, block, old, new):
    fixed = doctored(tmp_path, block, old, new, file)
    found = verdict("F1", fixed=fixed)
    assert (found.label, found.estimate) == ("not run", None)
    assert "entry of the ledger" in found.note or "another recipe" in found.note
    # the other profiles' hash and the other parts' are what they were
    assert fixed.hash(fixed.part("A1"), "study") == LEDGER.hash(LEDGER.part("A1"), "study")
    if file == "recipes.toml" or "study" in old:
        assert fixed.hash(fixed.part("F1"), "cpu") == LEDGER.hash(LEDGER.part("F1"), "cpu")
    assert fixed.prose(fixed.part("F1")) == LEDGER.prose(LEDGER.part("F1"))


@pytest.mark.parametrize(
    ("block", "old", "new"),
    [
        ("part.F1", "After a change of resolution, tuning", "Once the resolution has changed, tuning"),
        ("part.F1.says", "undecided = \"Whether", "undecided = \"If"),
        ("part.F1", "paper = 0.0", "paper = 0.1"),
        ("part.F1", 'paper_source = "A, Table 5"', 'paper_source = "B"'),
        ("part.F1", 'power = "over 0.99 at n = 20"', 'power = "?"'),
    ],
)  # fmt: skip
def test_prose_may_be_mended(tmp_path, block, old, new):
    fixed = doctored(tmp_path, block, old, new)
    assert verdict("F1", fixed=fixed).label == "level within 0.5"
    assert fixed.hash(fixed.part("F1"), "study") == LEDGER.hash(LEDGER.part("F1"), "study")
    assert fixed.prose(fixed.part("F1")) != LEDGER.prose(LEDGER.part("F1"))


def test_every_field_of_a_part_is_in_one_of_the_two_hashes(tmp_path):
    part = LEDGER.part("H4i")
    other = {
        "id": "x", "claim": "x", "title": "x", "notebook": "52", "kind": "equivalence", "metric": "x",
        "contrast": dict.fromkeys(part.contrast, 0.0), "margin": 1.4, "n": {"study": 21}, "primary": True, "contrary": "worse",
        "checks": (ledger.Check("x", {"hmlp supervised": 1.0, "linear supervised": -1.0}),), "device": "cuda",
        "out_of_scope": ("study",), "expected": "0", "paper": 0.1, "paper_source": "x", "paper_confidence": "read",
        "power": "x", "says": {}, "subsets": 0, "at": {},
    }  # fmt: skip
    assert set(other) == {f.name for f in fields(part)}
    values = {*ledger.VALUES, "checks", "n"}
    for name, value in other.items():
        changed = replace(part, **{name: value})
        moved = LEDGER.hash(changed, "study") != LEDGER.hash(part, "study")
        mended = LEDGER.prose(changed) != LEDGER.prose(part)
        assert (moved, mended) == ((name in values), (name not in {*values, "at", "notebook", "subsets"} or False)) or name in (
            "at", "notebook", "subsets",
        ), name  # fmt: skip
    # n of another profile and the order of the arms are no change
    assert LEDGER.hash(replace(part, n=dict(part.n) | {"cpu": 5}), "study") == LEDGER.hash(part, "study")
    turned = replace(part, contrast=dict(reversed(part.contrast.items())))
    assert LEDGER.hash(turned, "study") == LEDGER.hash(part, "study")
    # what is otherwise at one profile changes that profile's hash alone; subsets change the arms
    at = replace(part, at={"photos": {"margin": 0.7}})
    assert LEDGER.hash(at, "study") == LEDGER.hash(part, "study") and at.at_profile("photos").margin == 0.7
    with pytest.raises(UsageError, match="unknown arm of part H4i"):
        LEDGER.hash(replace(part, subsets=2), "study")


def test_the_hash_of_a_part_where_it_is_not_measured_is_refused_in_one_sentence():
    with pytest.raises(
        UsageError, match="part P2-3 is not measured at profile cpu: the ledger has it at pilot and imagenet"
    ):
        LEDGER.hash(LEDGER.part("P2-3"), "cpu")


def test_each_profile_stamps_the_parts_that_are_measured_there():
    for name in ("cpu", "study", "imagenet"):
        made = stamps(name)
        assert set(made) == {part.id for part in LEDGER.parts.values() if name in part.n} and len(
            set(made.values())
        ) == len({v for v in made.values()})
    assert {*PRIMARY} <= {*stamps("study")} and {"A1", "F1", "F2-full", "F2-attn"} <= {*stamps("cpu")}
    with pytest.raises(UsageError, match="unknown part of a claim 'F7'"):
        LEDGER.part("F7")


# ---- the interval


def latent(rng, mu: Sequence[float], seed_sd: float, image_sd: float, n: int, images: int) -> np.ndarray:
    """Answers of several arms, bool (arms, n, images): right where a latent normal is above 0.

    Difficulty is shared by the arms; each has image effects of its own (the same in all seeds), seed effects and noise.
    """
    arms = len(mu)
    own = rng.normal(0, image_sd, (arms, 1, images)) + rng.normal(0, seed_sd, (arms, n, 1))
    noise = rng.normal(0, 0.5, (arms, n, images))
    return np.array(mu)[:, None, None] + rng.normal(size=images) + own + noise > 0


def truth(mu: Sequence[float], coefficients: Sequence[float], seed_sd: float, image_sd: float) -> float:
    sd = math.sqrt(1 + image_sd**2 + seed_sd**2 + 0.25)
    return 100 * float(np.dot(coefficients, stats.norm.cdf(np.array(mu) / sd)))


@pytest.mark.parametrize(
    ("mu", "coefficients", "seed_sd", "image_sd", "n"),
    [
        ((1.3, 1.2), (1, -1), 0.02, 0.5, 5),
        ((1.3, 1.2), (1, -1), 0.1, 0.2, 5),
        ((1.0, 1.0), (1, -1), 0.06, 0.4, 20),
        ((1.3, 1.2, 1.0, 1.1), (1, -1, -1, 1), 0.02, 0.5, 5),  # an interaction
        ((1.3, 1.2, 1.0, 1.1), (1, -1, -1, 1), 0.06, 0.3, 10),
    ],
)
def test_the_interval_covers_the_truth_where_seeds_and_images_vary(mu, coefficients, seed_sd, image_sd, n):
    rng, expected = np.random.default_rng(7), truth(mu, coefficients, seed_sd, image_sd)
    names = [str(i) for i in range(len(mu))]
    covered, paired = [], []
    for _ in range(400 if n < 20 else 150):
        right = dict(zip(names, latent(rng, mu, seed_sd, image_sd, n, 400), strict=True))
        e = interval(difference(right, dict(zip(names, coefficients, strict=True))))
        covered.append(e.low <= expected <= e.high)
        paired.append(e.paired[0] <= expected <= e.paired[1])
    assert 0.92 <= np.mean(covered) <= 0.985
    assert np.mean(paired) <= np.mean(covered)
    if image_sd == 0.5:  # seeds alone do not cover it
        assert np.mean(paired) < 0.87


def test_the_interval_equals_a_long_form_anova():
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    rng = np.random.default_rng(3)
    n, N = 5, 40
    D = rng.integers(-1, 2, (n, N)) + rng.integers(0, 2, (1, N)) + rng.normal(0, 0.1, (n, 1))
    seeds, images = np.indices((n, N))
    long = pd.DataFrame({"d": 100 * D.ravel(), "seed": seeds.ravel(), "image": images.ravel()})
    table = anova_lm(ols("d ~ C(seed) + C(image)", long).fit())
    ms_s, ms_i, ms_r = (table.loc[row, "mean_sq"] for row in ("C(seed)", "C(image)", "Residual"))
    total = ms_s + ms_i - ms_r
    se = math.sqrt(max(total, ms_s) / (n * N))
    df = max(total**2 / (ms_s**2 / (n - 1) + ms_i**2 / (N - 1) + ms_r**2 / ((n - 1) * (N - 1))), n - 1)
    e = interval(D)
    assert e.mean == pytest.approx(long["d"].mean(), rel=1e-10)
    assert e.mean_squares == pytest.approx((ms_s, ms_i, ms_r), rel=1e-10)
    assert (e.se, e.df) == pytest.approx((se, df), rel=1e-10)
    assert (e.low, e.high) == pytest.approx(stats.t.interval(0.95, df, long["d"].mean(), se), rel=1e-10)
    assert e.seed_term + e.image_term == pytest.approx(se**2, rel=1e-10)
    per_seed = long.groupby("seed")["d"].mean()
    assert e.paired == pytest.approx(stats.t.interval(0.95, n - 1, per_seed.mean(), stats.sem(per_seed)), rel=1e-10)
    assert e.sd == pytest.approx(per_seed.std(), rel=1e-10)


def reml(d: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of d = mean + seed + image + noise, all three random, by restricted maximum likelihood."""
    n, N = d.shape
    y, ones = d.ravel(), np.ones(d.size)
    seeds, images = np.kron(np.eye(n), np.ones((N, N))), np.kron(np.ones((n, n)), np.eye(N))

    def solved(log_variances: np.ndarray) -> tuple[float, float, float]:
        s, i, r = np.exp(log_variances)
        L = np.linalg.cholesky(s * seeds + i * images + r * np.eye(d.size))
        a, b = np.linalg.solve(L, ones), np.linalg.solve(L, y)
        information = a @ a
        mean = a @ b / information
        rest = b - mean * a
        return mean, 1 / math.sqrt(information), np.log(np.diag(L)).sum() + (math.log(information) + rest @ rest) / 2

    start = np.log(np.array([0.1, 0.3, 0.6]) * y.var())
    found = minimize(lambda v: solved(v)[2], start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-7})
    return solved(found.x)[:2]


def test_a_mixed_model_gives_the_standard_error_of_an_interaction_of_the_pilot():
    arms = Archive(PILOT).results("52")
    contrast = {"hmlp pretrained": 1, "linear pretrained": -1, "hmlp scratch": -1, "linear scratch": 1}
    d = difference({arm: np.stack([r.correct for r in arms[arm]]) for arm in contrast}, contrast)[:, 4760:4780]
    e = interval(d)
    assert e.image_term > 0 and e.mean_squares[0] > e.mean_squares[2]  # no component is at its bound
    mean, se = reml(100.0 * d)
    assert e.mean == pytest.approx(mean, abs=1e-6) and e.se == pytest.approx(se, rel=1e-3)


def test_without_image_effects_the_interval_falls_back_on_seeds_with_n_minus_1_degrees_of_freedom():
    e = Estimate(0.0, (1.0, 0.2, 9.0), n=5, images=600)
    assert e.se**2 == pytest.approx(1.0 / 3000) and e.df == 4 and e.image_term == 0


def test_the_interval_does_not_depend_on_the_order_of_seeds_or_images_and_has_the_level_asked_for():
    rng = np.random.default_rng(0)
    D = difference(dict(zip("ab", latent(rng, (1.0, 0.9), 0.1, 0.3, 5, 500), strict=True)), {"a": 1, "b": -1})
    shuffled = interval(D[rng.permutation(5)][:, rng.permutation(D.shape[1])])
    assert (shuffled.low, shuffled.high) == pytest.approx((interval(D).low, interval(D).high), rel=1e-9)
    assert interval(D, level=0.9).low == pytest.approx(interval(D).bounds(0.9)[0])
    assert interval(D, level=0.9).low > interval(D).low


@pytest.mark.parametrize("shape", [(1, 600), (5, 1), (600,)])
def test_an_interval_of_one_seed_or_one_image_is_refused(shape):
    with pytest.raises(UsageError, match="two or more"):
        interval(np.zeros(shape))
    with pytest.raises(UsageError, match="two seeds or more"):
        over_seeds([1.0])


def test_arms_that_answer_alike_are_level_with_certainty_at_two_seeds_too():
    part = LEDGER.part("A1")
    for n in (2, 20):
        e = interval(np.zeros((n, 100)))
        assert (e.low, e.high, e.df, e.se) == (0, 0, n - 1, 0)
        assert judge.label(part, e) == judge.label(replace(part, kind="superiority"), e) == "level within 0.5"
        assert judge.label(replace(part, kind="non-inferiority"), e) == "not worse by 0.5"
        assert (statistics.p_value("equivalence", e, 0.5), statistics.p_value("superiority", e, 0.5)) == (0, 1)
        assert statistics.tightest(e) == 0 and statistics.seeds_needed(e, 0.4) == 2


def test_one_same_difference_in_every_seed_on_every_image_is_found_with_certainty():
    part = LEDGER.part("A1")
    for sign, word in ((1, "better by 100.00 to 100.00"), (-1, "worse by 100.00 to 100.00")):
        e = interval(np.full((2, 10), sign))
        assert (e.low, e.high) == (100 * sign, 100 * sign) and judge.label(part, e) == word
        assert statistics.p_value("superiority", e, None) == 0 and statistics.p_value("equivalence", e, 0.5) == 1


def test_arms_of_different_images_are_refused():
    right = {"a": np.ones((5, 100), bool), "b": np.ones((5, 99), bool)}
    with pytest.raises(UsageError, match="same seeds and images"):
        difference(right, {"a": 1, "b": -1})


# ---- p, margins, power


@pytest.mark.parametrize("mean", [-0.9, -0.6, -0.35, -0.1, 0.0, 0.2, 0.38, 0.45, 0.7])
@pytest.mark.parametrize("id", ["A1", "F1", "P5", "H3-conv"])
def test_two_one_sided_tests_are_those_of_statsmodels_where_seeds_alone_vary(id, mean):
    part = LEDGER.part(id)
    one, other = part.contrast
    base = PASSING.get(other, 0.0)
    made = source(id, {one: base + mean}, 0.5)
    found = evidence.verdict(made, part)
    x, y = (100 * made.arms[part.notebook, arm].mean(axis=1) for arm in (one, other))
    p, _, _ = ttost_paired(x, y, -part.margin, part.margin)
    assert found.p == pytest.approx(p, rel=0.02, abs=1e-12) and found.estimate.df == pytest.approx(len(x) - 1, rel=0.01)
    assert (found.label == f"level within {part.margin:g}") == (p < 0.05)
    # the tightest margin is where the two tests pass
    for m, passes in ((1.001, True), (0.999, False)):
        at = found.estimate and m * statistics.tightest(found.estimate)
        assert (ttost_paired(x, y, -at, at)[0] < 0.05) == passes
    for m, passes in ((1 + 1e-9, True), (1 - 1e-9, False)):
        at = m * statistics.tightest(found.estimate)
        assert judge.label(part, found.estimate, at).startswith("level") == passes
        assert (statistics.p_value("equivalence", found.estimate, at) < 0.05) == passes


@pytest.mark.parametrize("mean", [-3.0, -1.2, -0.4, 0.0, 0.3, 0.56, 1.1, 2.5])
def test_p_and_label_agree(mean):
    e, part = Estimate(mean, (5 * 0.2**2, 0.0, 0.0), 5, 1), LEDGER.part("A1")
    assert statistics.p_value("superiority", e, None) == pytest.approx(2 * stats.t.sf(abs(mean) / 0.2, 4))
    for kind in ("superiority", "equivalence", "non-inferiority"):
        word = judge.label(replace(part, kind=kind), e, 1.5)
        significant = statistics.p_value(kind, e, 1.5) < 0.05
        expected = (
            word in ("same direction", "opposite direction")
            if kind == "superiority"
            else judge.is_predicted(replace(part, kind=kind), word)
        )
        assert significant == expected, kind


@pytest.mark.parametrize(("kind", "paper"), [("superiority", 0.38), ("superiority", -0.3), ("equivalence", -0.1), ("equivalence", 0.0), ("non-inferiority", 0.1), ("non-inferiority", -0.3)])  # fmt: skip
@pytest.mark.parametrize("n", [5, 20])
def test_the_power_is_how_often_the_predicted_label_is_found(kind, paper, n):
    sd, m, rng = 0.7, 0.5, np.random.default_rng(1)
    x = rng.normal(paper, sd, (40_000, n))
    mean, se = x.mean(axis=1), x.std(axis=1, ddof=1) / math.sqrt(n)
    two, one = (stats.t.ppf(q, n - 1) * se for q in (0.975, 0.95))
    found = {
        "superiority": np.sign(paper) * mean > two, "equivalence": np.abs(mean) + one < m, "non-inferiority": mean - one > -m,
    }[kind].mean()  # fmt: skip
    assert statistics.power(paper, sd / math.sqrt(n), n - 1, kind, m) == pytest.approx(found, abs=0.012)


def test_the_ledgers_powers_are_those_of_the_pilots_standard_errors():
    """Said beside the label, so that it cannot be called open without a word on what could have been seen."""
    kept = pd.read_csv(PILOT / "claims.csv", index_col="part")
    for id, low, high in (("A1", 0.99, 1.0), ("F1", 0.99, 1.0), ("F2-full", 0.05, 0.5), ("P5", 0.99, 1.0)):
        part = LEDGER.part(id)
        n = part.n["study"]
        power = statistics.power(part.paper, kept.loc[id, "sd"] / math.sqrt(n), n - 1, part.kind, part.margin)
        assert low <= power <= high, (id, power)
    for part in LEDGER.parts.values():
        assert part.kind in ("exact", "ratio") or "study" not in part.n or part.power, part.id


def test_a_new_mean_falls_into_the_prediction_in_95_of_100_cases():
    rng, trials = np.random.default_rng(2), 4000
    seen, new = rng.normal(0.3, 0.6, (trials, 20)), rng.normal(0.3, 0.6, (trials, 5)).mean(axis=1)
    inside = []
    for values, mean in zip(seen, new, strict=True):
        low, high = statistics.prediction(over_seeds(values), 5)
        inside.append(low < mean < high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_seeds_needed_are_the_fewest_that_make_the_papers_difference_visible():
    e = Estimate(0.0, (5 * 0.2**2, 0.0, 0.0), 5, 1)
    n = statistics.seeds_needed(e, 0.4)
    again = [statistics.smallest_visible(replace(e, n=k)) for k in (n - 1, n)]
    assert again[0] > 0.4 >= again[1]
    assert statistics.seeds_needed(e, -0.4) == n
    assert statistics.seeds_needed(e, statistics.smallest_visible(e) * (1 + 1e-12)) == e.n
    with_images = Estimate(0.0, (40.0, 90.0, 9.0), n=50, images=500)
    assert statistics.seeds_needed(with_images, statistics.smallest_visible(with_images) * (1 + 1e-12)) == 50


def test_more_seeds_cannot_make_up_for_too_few_images():
    a, b = (latent(np.random.default_rng(i), (1.0,), 0.01, 0.0, 5, 2000)[0] for i in range(2))
    e = interval(a.astype(float) - b)  # each arm has another difficulty of the images
    assert e.image_term > 5 * e.seed_term
    floor = (stats.t.ppf(0.975, 1999) + stats.t.ppf(0.8, 1999)) * math.sqrt(e.image_term)
    assert statistics.seeds_needed(e, 0.99 * floor) == "not reachable with this test set"
    assert statistics.seeds_needed(e, 1.05 * floor) > 1


# ---- Holm, and what a claim's parts say together


def by_hand(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: from the smallest on times n, n - 1, .., never falling, at most 1."""
    found, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = highest
    return found


def test_holm_agrees_with_a_hand_computation():
    # sorted .01 .02 .03 .04, times 4 3 2 1 = .04 .06 .06 .04, then the running maximum
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert by_hand([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert len(statistics.holm([])) == 0
    rng = np.random.default_rng(0)
    for n in (2, 5):
        p = rng.choice([0.001, 0.01, 0.02, 0.04, 0.3, 1.0], n)  # with ties
        assert list(statistics.holm(p)) == pytest.approx(by_hand(list(p)))
        assert list(statistics.holm(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))


def whole(points: Mapping[str, float], sd: float = 0.1, without: Sequence[str] = (), name: str = "study") -> Planted:
    """The runs of every part of a profile; arms without a value pass the checks of their parts."""
    names = {(part.notebook, arm) for part in TRAINED if name in part.n for arm in part.at_profile(name).arms}
    values = {}
    for i, key in enumerate(sorted(names)):
        base = key[1].partition(", subset")[0]
        n = len(profiles.PROFILES[name].seeds)
        noise = np.random.default_rng(i).permutation(spread(n, sd))
        if key[0] not in without:
            values[key] = points.get(base, PASSING.get(base, 0.0)) + noise
    return Planted(planted(values), name)


def test_holms_correction_is_over_the_five_primary_parts():
    assert [part.id for part in LEDGER.parts.values() if part.primary] == list(PRIMARY)
    made = whole({"full": 0.1, "attn": 0.05, "hmlp pretrained": 0.15, "linear pretrained": 0.0, "conv pretrained": 0.2})
    found = {v.part.id: v for v in evidence.verdicts(made)}
    raw = [found[id].p for id in PRIMARY]
    assert all(not v.label.startswith(("not run", "check")) for id, v in found.items() if id in PRIMARY)
    for expected in (list(multipletests(raw, method="holm")[1]), by_hand(raw)):
        assert [found[id].p_holm for id in PRIMARY] == pytest.approx(expected)
    assert all(v.p_holm is None for id, v in found.items() if id not in PRIMARY)
    # alone each p is the part's own test on its own runs
    for id in PRIMARY:
        assert found[id].p == evidence.verdict(made, LEDGER.part(id)).p


def test_a_part_that_is_not_run_or_failed_a_check_counts_as_p_1_and_a_predicted_label_may_be_lost():
    some = {"full": 0.06, "ffn": 0.0, "attn": 0.06}
    made = whole(some, without=("52",))
    del made.tried["6x2+LS"]  # A1 fails its check
    first = evidence.verdict(made, LEDGER.part("F2-full"))
    found = {v.part.id: v for v in evidence.verdicts(made)}
    assert found["A1"].label == "check failed: rate of 6x2+LS bracketed" and found["A1"].p < 1e-6
    assert [found[id].estimate for id in PRIMARY[3:]] == [None, None] and found["H4-linear"].p_holm is None
    raw = [1.0, found["F1"].p, found["F2-full"].p, 1.0, 1.0]
    assert [found[id].p_holm for id in PRIMARY[:3]] == pytest.approx(by_hand(raw)[:3])
    # F1's p is the smallest, so F2-full's counts four times
    assert 0.0125 < first.p < 0.05 and found["F2-full"].p_holm == pytest.approx(4 * first.p)
    assert first.label == "same direction"
    assert (found["F2-full"].label, found["F2-full"].note) == ("undecided", "same direction without Holm's correction")
    assert found["F2-full"].sentence == LEDGER.part("F2-full").says["undecided"]
    assert found["F1"].label == "level within 0.5" and found["F1"].p_holm == pytest.approx(5 * found["F1"].p)


def said(
    id: str, word: str, mean: float = 1.0, p: float = 0.001, profile: str = "study", **changed: object
) -> judge.Verdict:
    """A verdict with a label, and an estimate whose two-sided p against 0 is this."""
    se = abs(mean) / stats.t.isf(p / 2, 19)
    estimate = Estimate(mean, (20 * se**2, 0.0, 0.0), 20, 1)
    assert statistics.p_value("superiority", estimate, None) == pytest.approx(p)
    return judge.Verdict(LEDGER.part(id), profile, word, estimate, **changed)


HELD, NOT_HELD, OPEN = "held here", "did not hold here", "undecided here"


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        ([("A1", "level within 0.5", 0.1)], HELD),
        ([("A1", "worse by 0.60 to 0.90", -0.7)], NOT_HELD),
        ([("A1", "better by 0.60 to 0.90", 0.7)], OPEN),
        ([("A1", "undecided", 0.7)], OPEN), ([("A1", "check failed: learned", -0.7)], OPEN), ([("A1", "not run", 0.1)], OPEN),
        ([("F2-full", "same direction", 0.7), ("F2-attn", "same direction", 0.7)], HELD),
        ([("F2-full", "same direction", 0.7), ("F2-attn", "level within 0.5", 0.1)], OPEN),
        ([("F2-full", "same direction", 0.7), ("F2-attn", "opposite direction", -0.7)], NOT_HELD),
        ([("P2-1", "same direction", 0.7), ("P2-3", "same direction", 0.7)], "exploratory"),
        ([("P2-1", "opposite direction", -0.7)], "exploratory"),
        ([("F5-digits", "not worse by 0.5", 0.1)], "exploratory"), ([("F3-time", "same direction", 0.2)], "exploratory"),
        ([("H2-ln", "exact", 1.0), ("H2-conv", "exact", 1.0)], "counted"),
        ([("H2-ln", "exact", 1.0), ("H2-conv", "fails", 1.0)], NOT_HELD),
        ([("A1", "not judged at smoke", 0.1)], "not judged at smoke"),
    ],
)  # fmt: skip
def test_what_a_claims_parts_say_together(verdicts, word):
    assert judge.claim_verdict([said(*one) for one in verdicts]) == word
    there = judge.claim_verdict([said(*one, profile="imagenet") for one in verdicts])
    assert there == {HELD: "supports", NOT_HELD: "contradicts", OPEN: "open"}.get(word, word) or word == NOT_HELD


def test_a_contrary_label_counts_after_holms_correction_within_the_claim():
    """H4 has three parts: one contrary label needs p of a third of 0.05, two a p of a half for the larger."""
    fine = [said("H4-stems", "not worse by 1", 0.1)]
    for p, word in ((0.016, NOT_HELD), (0.018, OPEN)):
        against = [said("H4-conv", "opposite direction", -1.0, p), said("H4-linear", "same direction", 1.0)]
        assert judge.claim_verdict([*against, *fine]) == word
    for p, word in ((0.024, OPEN), (0.016, NOT_HELD)):
        both = [said(id, "opposite direction", -1.0, p) for id in ("H4-conv", "H4-linear")]
        assert judge.claim_verdict([*both, *fine]) == word
    mine = [said("A1", "worse by 0.10 to 0.20", -0.5, 0.049)]
    assert judge.claim_verdict(mine) == NOT_HELD  # alone in its claim


def test_what_the_pilot_measured_and_what_is_out_of_scope_decide_nothing():
    mine = [said("F2-full", "same direction"), said("F2-attn", "opposite direction", -1.0, source="pilot")]
    assert judge.claim_verdict(mine) == HELD
    assert judge.claim_verdict([mine[0], said("F2-attn", "out of scope at this scale", -1.0)]) == HELD
    assert judge.claim_verdict([said("A1", "level within 0.5", 0.1, source="pilot")]) == OPEN
    ours = judge.corrected(
        [said("A1", "level within 0.5", 0.1, source="pilot", p=0.001), said("F1", "level within 0.5", 0.1)]
    )
    assert [v.p_holm for v in ours] == [None, 1.0]


def test_below_imagenet_nothing_supports_contradicts_or_reproduces():
    strong = re.compile("support|contradict|reproduc|prove", re.I)
    for name in ("study", "cpu"):
        for made in (whole({}, name=name), whole({"full": 1.0, "attn": -1.0, "6x2+LS": -1.5}, name=name)):
            table = judge.verdict_table(evidence.verdicts(made))
            for column in ("label", "says", "note", "claim_verdict", "contains_paper"):
                assert not [text for text in table[column].dropna() if strong.search(text)], column
    assert not [text for part in LEDGER.parts.values() for text in part.says.values() if strong.search(text)]


def test_the_paper_is_in_our_interval_or_not_or_the_interval_is_too_wide_to_say():
    part = replace(LEDGER.part("P2-1"), paper=0.4, margin=0.5)

    def on(mean: float, half: float, **fields: object) -> str:
        se = half / stats.t.ppf(0.975, 4)
        return judge.Verdict(
            replace(part, **fields), "study", "undecided", Estimate(mean, (5 * se**2, 0.0, 0.0), 5, 1)
        ).contains_paper

    assert [on(0.5, 0.2), on(0.7, 0.2), on(-0.4, 0.2), on(0.4, 0.6), on(1.2, 0.6)] == [
        "yes",
        "no",
        "no",
        "too wide to say",
        "no",
    ]
    # a value that was read off a chart may be 0.1 wrong
    assert [on(0.65, 0.2, paper_confidence=kind) for kind in ("read", "read-chart")] == ["no", "yes"]
    assert on(0.5, 0.2, paper=None) == "" and judge.Verdict(part, "study", "not run").contains_paper == ""


def test_a_difference_that_was_found_has_its_ratio_to_the_papers():
    e = Estimate(4.0, (1.0, 0.0, 0.0), 5, 1)
    for word, times in (
        ("same direction", 10.0),
        ("opposite direction", 10.0),
        ("level within 5", None),
        ("undecided", None),
    ):
        assert judge.Verdict(LEDGER.part("P2-1"), "study", word, e).times_paper == times
    assert (
        judge.Verdict(LEDGER.part("F1"), "study", "better by 1.00 to 7.00", e).times_paper is None
    )  # the paper's is 0


def test_labels_move_with_the_margin_and_what_was_not_judged_stays_so():
    some = [said("A1", "level within 0.5", 0.4, p=0.001), said("P2-1", "undecided", 0.4, p=0.3)]
    failed = said("F1", "check failed: learned", 0.1)
    moved = judge.moved([*some, failed, judge.Verdict(LEDGER.part("P5"), "study", "not run")], (0.5, 0.3, 0.75, 0.5))
    assert list(moved.columns) == ["part", "margin", "tightest", "at 0.3", "at 0.5", "at 0.75"]
    rows = moved.set_index("part")
    low, high = some[0].estimate.bounds(0.95)
    assert rows.loc["A1", "tightest"] == statistics.tightest(some[0].estimate) == pytest.approx(0.58, abs=0.01)
    assert list(rows.loc["A1"][2:]) == [f"better by {low:.2f} to {high:.2f}"] * 2 + ["level within 0.75"]
    assert list(rows.loc["P2-1"][2:]) == ["undecided"] * 3 and set(rows.loc["F1"][2:]) == {"check failed: learned"}
    assert "P5" not in rows.index


def test_the_table_has_a_row_a_verdict_with_its_numbers():
    made = whole({"6x2+LS": 0.1})
    every = evidence.verdicts(made)
    table = judge.verdict_table(every).set_index("part")
    assert list(table.index) == list(LEDGER.parts) and list(judge.verdict_table([]).columns) == list(judge.COLUMNS)
    row, v = table.loc["A1"], next(v for v in every if v.part.id == "A1")
    d = by_seed(made, "A1")
    assert (row["n"], row["test_images"], row["contrast"], row["test"]) == (
        20,
        IMAGES,
        "6x2+LS - 12x1+LS",
        "equivalence",
    )
    assert (row["ours"], row["sd"]) == pytest.approx((d.mean(), d.std(ddof=1)))
    assert (row["low"], row["high"], row["p"], row["p_holm"]) == (v.estimate.low, v.estimate.high, v.p, v.p_holm)
    assert row["seed_se"] ** 2 + row["image_se"] ** 2 == pytest.approx(v.estimate.se**2)
    assert (row["paired_low"], row["paired_high"]) == pytest.approx(stats.t.interval(0.95, 19, d.mean(), stats.sem(d)))
    assert row["tightest"] == statistics.tightest(v.estimate) and row["margin"] == 0.5
    assert row["checks"].startswith("learned: passed; rate of 6x2+LS bracketed: passed; ")
    assert (row["label"], row["says"]) == ("level within 0.5", LEDGER.part("A1").says["predicted"])
    assert len(row["runs"].split()) == 20 + 20 + 10 and row["claim_verdict"] == HELD
    assert (
        table.loc["H8-retention", "contrast"] == "hmlp pretrained - conv pretrained - hmlp supervised + conv supervised"
    )
    assert table.loc["P1", "contrast"] == "" and table.loc["B1-Ti", "label"] == "not run"


# ---- a reader's own runs beside the reference


def test_at_cpu_an_estimate_stands_beside_the_references_and_has_no_label_of_its_own(monkeypatch):
    theirs = whole({"6x2+LS": 0.1, "full": 0.3}, sd=0.2)
    part = LEDGER.part("A1")
    low, high = statistics.prediction(evidence.verdict(theirs, part).estimate, 5)
    for mean, word in ((0.1, "as the reference"), (0.1 + 2, "outside the reference's prediction"), (-2.0, "outside the reference's prediction")):  # fmt: skip
        made = whole({"6x2+LS": mean}, name="cpu", sd=0.1)
        found = next(v for v in evidence.verdicts(made, theirs) if v.part.id == "A1")
        assert found.label == word and judge.outcome(found.part, found.label) == "" and found.sentence == ""
        assert f"predicts {low:+.2f} to {high:+.2f} for 5 seeds" in found.note
        assert judge.claim_verdict([found]) == word
    assert next(v for v in evidence.verdicts(made) if v.part.id == "A1").label == "no reference yet"
    shown = {v.part.id: v.label for v in evidence.verdicts(made, theirs)}
    assert shown["H4-linear"] == "not run"  # Thing 3 is shown and not compared


def test_a_ratio_of_times_is_compared_with_no_other_machines_and_a_failed_check_stays():
    ours, theirs = (
        judge.ratio(LEDGER.part("F3-time"), name, over_seeds(np.log(x)), "x")
        for name, x in (("cpu", (1.2, 1.21)), ("study", (2.2, 2.21)))
    )
    assert judge.replicated(ours, theirs) == ours
    failed = said("A1", "check failed: learned", profile="cpu")
    assert judge.replicated(failed, said("A1", "level within 0.5")) == failed


def test_cpu_trains_the_studys_recipes_of_the_parts_that_it_repeats():
    for part in (part for part in TRAINED if "cpu" in part.n):
        for arm in part.at_profile("cpu").arms:
            here, there = (LEDGER.recipe(part, name, arm) for name in ("cpu", "study"))
            assert here["record"] == there["record"], (part.id, arm)
        assert part.at_profile("cpu").contrast == part.at_profile("study").contrast
