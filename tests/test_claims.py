"""The rules of judging: the interval, labels and checks, Holm's corrections, what voids a run, the ledger, the search for rates."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lab import paths
from lab.claims import evidence, exact, judge, ledger, statistics, tuning
from lab.claims.evidence import Evidence
from lab.claims.ledger import PROFILES
from lab.experiments import profiles
from lab.runs import results
from lab.runs.results import Archive, Result
from vitlib.errors import UsageError
from vitlib.stats import Estimate, over_seeds

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
                f"{label} {seed}", {"top1": 100 * right.mean()}, right, stamps(self.name) | changed["stamps"], about
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
