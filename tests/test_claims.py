"""The rules of judging: the interval, the words, the checks, and that the ledger is complete."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lab import paths
from lab.__main__ import main
from lab.claims import evidence, exact, statistics, tuning
from lab.claims import judge as judging
from lab.claims.judge import judge
from lab.claims.ledger import CHECKS, ledger, ledger_hashes, part_hash
from lab.claims.statistics import Estimate, interval
from lab.experiments import small
from lab.experiments.catalogue import arms_of
from lab.experiments.profiles import profile as scale
from lab.runs import store
from lab.runs.results import Result
from tools import pilot
from vitlib.errors import UsageError

LEDGER = ledger()
HASHES = [ledger_hashes()]
PARTS = {
    "B1": 3, "P1": 1, "P2": 3, "A1": 1, "P3": 1, "P4": 1, "P5": 1, "P6": 3, "P7": 6, "F1": 1, "F2": 2, "F3": 2, "F4": 1,
    "F5": 6, "F6": 12,
    "H1": 1, "H2": 4, "H3": 2, "H4": 3, "H4i": 1, "H5": 2, "H6": 2, "H7": 1,
}  # fmt: skip
TRAINED = [part for part in LEDGER.values() if part.kind != "exact"]
OF_POINTS = [part for part in TRAINED if part.kind != "ratio"]


NOISE = 0.02  # standard deviation, of an image in a run


def difficulties(images: int = 2000) -> np.ndarray:
    return np.random.default_rng(99).random(images)


def answers(accuracy: float, n: int = 5, images: int = 2000, seed: int = 0) -> np.ndarray:
    """(n, images) bool: about this accuracy; images differ in difficulty, the same for every arm."""
    noise = np.random.default_rng(seed).normal(0, NOISE, (n, images))
    return difficulties(images) + noise < accuracy


def every_arm(part, accuracies: dict[str, float], default: float = 0.7) -> dict[str, np.ndarray]:
    """Synthetic answers of all arms of a part's notebook, at its 36-pair names too."""
    arms = [arm for name in ("study", "imagenet") for n in (12, 36) for arm in part.at_profile(name).arms(n)]
    arms += [*part.contrast_at(12), *part.contrast_at(36), *accuracies, *filter(None, [part.parent])]
    return {arm: answers(accuracies.get(arm, default), seed=i) for i, arm in enumerate(dict.fromkeys(arms))}


def verdict_on(id: str, accuracies: dict[str, float], profile: str = "study", pairs: int = 36, **more):
    part = LEDGER[id]
    return judge(part, every_arm(part, accuracies), profile, pairs, 10, hashes=HASHES, **more)


# What passes every check of notebooks 41 and 52
TUNED = {"full": 0.75, "attn": 0.75, "ffn": 0.7, "head": 0.6, "trunk": 0.74}
HELPED = {"linear scratch": 0.6, "linear pretrained": 0.7}


# ---- The interval ----


def simulated(
    rng, mu: tuple[float, float], seed_sd: float, image_sd: float, n: int, images: int, repeats: int
) -> list[tuple[np.ndarray, float]]:
    """Differences of two arms' correctness, and the true mean: an arm is right where its latent normal is above 0.

    Difficulty is shared by the arms, so their answers are correlated; each arm has image effects of its own (the same
    in all seeds), seed effects of its own, and noise.
    """
    out = []
    for _ in range(repeats):
        shared = rng.normal(size=images)
        own = rng.normal(0, image_sd, (2, 1, images)) + rng.normal(0, seed_sd, (2, n, 1))
        latent = np.array(mu)[:, None, None] + shared + own + rng.normal(0, 0.5, (2, n, images))
        out.append((latent[0] > 0) * 1.0 - (latent[1] > 0))
    sd = math.sqrt(1 + image_sd**2 + seed_sd**2 + 0.25)
    truth = 100 * (stats.norm.cdf(mu[0] / sd) - stats.norm.cdf(mu[1] / sd))
    return [(D, truth) for D in out]


@pytest.mark.parametrize("seed_sd, image_sd", [(0.02, 0.5), (0.1, 0.2), (0.06, 0.4)])
def test_the_interval_covers_the_truth_and_paired_t_covers_less_where_images_dominate(seed_sd, image_sd):
    rng = np.random.default_rng(7)
    trials = simulated(rng, (1.3, 1.2), seed_sd, image_sd, n=5, images=600, repeats=400)
    estimates = [(interval(D), truth) for D, truth in trials]
    covered = np.mean([e.low <= truth <= e.high for e, truth in estimates])
    paired = np.mean([e.paired[0] <= truth <= e.paired[1] for e, truth in estimates])
    assert 0.92 <= covered <= 0.98
    assert paired <= covered
    if image_sd == 0.5:
        assert paired < 0.85


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


def test_without_image_effects_the_interval_falls_back_on_seeds_with_n_minus_1_degrees_of_freedom():
    e = Estimate(0.0, (1.0, 0.2, 9.0), n=5, images=600)
    assert e.se**2 == pytest.approx(1.0 / 3000) and e.df == 4 and e.image_term == 0


def test_the_interval_does_not_depend_on_the_order_of_seeds_or_images_and_has_the_level_asked_for():
    D = answers(0.7, seed=1).astype(float) - answers(0.68, seed=2)
    rng = np.random.default_rng(0)
    shuffled = interval(D[rng.permutation(5)][:, rng.permutation(D.shape[1])])
    assert (shuffled.low, shuffled.high) == pytest.approx((interval(D).low, interval(D).high), rel=1e-9)
    assert interval(D, level=0.9).low == pytest.approx(interval(D).bounds(0.9)[0])
    assert interval(D, level=0.9).low > interval(D).low


@pytest.mark.parametrize("shape", [(1, 600), (5, 1), (600,)])
def test_an_interval_of_one_seed_or_one_image_is_refused(shape):
    with pytest.raises(UsageError, match="two or more"):
        interval(np.zeros(shape))


def test_a_slope_is_the_change_from_the_smallest_to_the_largest_size():
    widths = [64, 128, 512]
    line = np.array([0.0, 1.0, 3.0])  # one point a doubling
    e = statistics.slope(line[None] + np.array([[0.0], [5.0], [-5.0]]) + 0.0, widths)
    assert e.mean == pytest.approx(3.0) and e.se == pytest.approx(0.0, abs=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=(5, 3))
    per_seed = [3 * np.polyfit(np.log2(widths), y, 1)[0] for y in noisy]
    e = statistics.slope(noisy, widths)
    assert e.df == 4
    assert (e.low, e.high) == pytest.approx(stats.t.interval(0.95, 4, np.mean(per_seed), stats.sem(per_seed)))


# ---- The words ----


def spread(mean: float, se: float = 0.2) -> Estimate:
    """An estimate with this mean and standard error, the seed as unit."""
    return Estimate(mean, (5 * se**2, 0.0, 0.0), n=5, images=1)


@pytest.mark.parametrize(
    "test, mean, se, word",
    [
        (judging.superiority, 2.0, 0.2, "same direction"),
        (judging.superiority, -2.0, 0.2, "opposite direction"),
        (judging.superiority, 0.1, 0.2, "equivalent within m"),
        (judging.superiority, 0.1, 2.0, "inconclusive"),
        (judging.superiority, 0.7, 0.2, "same direction"),  # inside the margin too, but beyond 0 comes first
        (judging.equivalence, 0.7, 0.2, "equivalent within m"),  # beyond 0 too, but inside the margin comes first
        (judging.equivalence, 3.0, 0.2, "different by more than m"),
        (judging.equivalence, -3.0, 0.2, "different by more than m"),
        (judging.equivalence, 1.5, 0.2, "inconclusive"),
        (judging.non_inferiority, 5.0, 0.2, "not inferior by m"),
        (
            judging.non_inferiority,
            -1.0,
            0.2,
            "not inferior by m",
        ),  # by the one-sided limit; the 95 % interval reaches -m
        (judging.non_inferiority, -3.0, 0.2, "inferior by more than m"),
        (judging.non_inferiority, -1.5, 0.2, "inconclusive"),
    ],
)
def test_each_word_is_reached(test, mean, se, word):
    assert test(spread(mean, se), 1.5) == word


def test_exact_parts_hold_or_fail():
    assert (judging.EXACT, judging.FAILS) == ("exact", "fails")
    assert exact.exact_holds("0", 0.0) and not exact.exact_holds("0", 1e-12)
    assert exact.exact_holds("not 0", 1e-12) and not exact.exact_holds("not 0", 0.0)
    assert not exact.exact_holds("not 0", math.nan)
    assert statistics.prints_as(17.583, "17.58") and not statistics.prints_as(17.583, "17.59")
    assert statistics.prints_as(256.7, "257")


@pytest.mark.parametrize(
    "test, level, bound",
    [
        (judging.superiority, 0.95, 0.0),
        (judging.equivalence, 0.90, 1.5),
        (judging.equivalence, 0.95, 1.5),
        (judging.non_inferiority, 0.90, -1.5),
        (judging.non_inferiority, 0.95, -1.5),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_a_touched_bound_is_inconclusive(test, level, bound, side):
    """The margin is set to the very number that is the interval's end, so that they touch to the last bit."""
    se = 2.0 if test is judging.superiority else 0.2  # too wide to be equivalent instead
    if bound == 0.0:
        half = spread(0.0, se).bounds(level)[1]
        estimate, m = spread(half if side == 0 else -half, se), 1.5
        assert estimate.bounds(level)[side] == 0.0
    else:
        sign = 1 if side == 0 else -1
        estimate = spread(sign * abs(bound))
        # the inner or the outer end, whichever the test looks at
        m = abs(estimate.bounds(level)[side if level == 0.95 else 1 - side])
        if test is judging.non_inferiority:
            estimate = spread(-abs(bound))
            m = -estimate.bounds(level)[0 if level == 0.90 else 1]
    assert test(estimate, m) == "inconclusive"


def test_swapping_the_arms_swaps_the_direction_and_leaves_equivalence():
    a, b = answers(0.75, seed=1), answers(0.70, seed=2)
    there, back = (interval(x.astype(float) - y) for x, y in ((a, b), (b, a)))
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert judging.superiority(there, 1.5) == "same direction"
    assert judging.superiority(back, 1.5) == "opposite direction"
    for m in (1.5, 5.0, 20.0):
        assert judging.equivalence(there, m) == judging.equivalence(back, m)
        assert statistics.p_value("equivalence", there, m) == pytest.approx(statistics.p_value("equivalence", back, m))


@pytest.mark.parametrize("mean", [-3.0, -1.2, -1.0, -0.4, 0.0, 0.3, 0.5, 0.6, 1.1, 2.5])
def test_p_and_word_agree(mean):
    e, m = spread(mean), 1.5
    assert (statistics.p_value("superiority", e, m) < 0.05) == (
        judging.superiority(e, m) in ("same direction", "opposite direction")
    )
    assert (statistics.p_value("equivalence", e, m) < 0.05) == (judging.equivalence(e, m) == "equivalent within m")
    assert (statistics.p_value("non-inferiority", e, m) < 0.05) == (
        judging.non_inferiority(e, m) == "not inferior by m"
    )


def test_arms_that_answer_alike_are_equivalent_with_certainty():
    e = interval(np.zeros((5, 100)))
    assert (e.low, e.high, e.df) == (0, 0, 4)
    assert judging.equivalence(e, 1.5) == "equivalent within m"
    assert (statistics.p_value("equivalence", e, 1.5), statistics.p_value("superiority", e, 1.5)) == (0, 1)


# ---- Beside a verdict ----


def test_holm_agrees_with_a_hand_computation():
    # sorted .01 .02 .03 .04, times 4 3 2 1 = .04 .06 .06 .04, then the running maximum
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert len(statistics.holm([])) == 0


def test_seeds_needed_are_the_fewest_that_make_the_papers_difference_visible():
    e = spread(0.0)
    n = statistics.seeds_needed(e, 0.4)
    again = [statistics.smallest_visible(replace(e, n=k)) for k in (n - 1, n)]
    assert again[0] > 0.4 >= again[1]
    assert statistics.seeds_needed(e, -0.4) == n
    assert statistics.seeds_needed(e, statistics.smallest_visible(e) * (1 + 1e-12)) == e.n
    with_images = Estimate(0.0, (40.0, 90.0, 9.0), n=50, images=500)
    assert statistics.seeds_needed(with_images, statistics.smallest_visible(with_images) * (1 + 1e-12)) == 50


def test_more_seeds_cannot_make_up_for_too_few_images():
    D = answers(0.7, seed=1).astype(float) - answers(0.7, seed=2)[:, np.random.default_rng(0).permutation(2000)]
    e = interval(D)
    assert e.image_term > 10 * e.seed_term
    floor = (stats.t.ppf(0.975, 1999) + stats.t.ppf(0.8, 1999)) * math.sqrt(e.image_term)
    assert statistics.seeds_needed(e, 0.99 * floor) == "not reachable with this test set"
    assert statistics.seeds_needed(e, 1.05 * floor) > 1


# ---- Verdicts ----


def test_every_judged_word_is_reached_through_judge():
    words = [
        verdict_on("P2-1", {"18x2": 0.75}).word,
        verdict_on("P2-1", {"18x2": 0.65}).word,
        verdict_on("P2-1", {}).word,
        verdict_on("A1", {}).word,
        verdict_on("A1", {"18x2+LS": 0.65}).word,
        verdict_on("H4-stems", {**HELPED, "conv pretrained": 0.65}).word,
        verdict_on("H4-stems", {**HELPED, "conv pretrained": 0.75}).word,
        verdict_on("A1", {"18x2+LS": 0.685}).word,
    ]
    assert words == [
        "same direction",
        "opposite direction",
        "equivalent within m",
        "equivalent within m",
        "different by more than m",
        "not inferior by m",
        "inferior by more than m",
        "inconclusive",
    ]


def test_a_predicted_word_supports_and_its_opposite_contradicts():
    assert verdict_on("P2-1", {"18x2": 0.75}).stance == "supports"
    assert verdict_on("P2-1", {"18x2": 0.65}).stance == "contradicts"
    assert verdict_on("A1", {"18x2+LS": 0.65}).stance == "contradicts"
    assert verdict_on("A1", {"18x2+LS": 0.685}).stance == "open"
    assert verdict_on("H4-stems", {**HELPED, "conv pretrained": 0.75}).stance == "contradicts"


def test_equivalence_contradicts_a_predicted_difference_only_where_the_papers_own_lies_outside_the_margin():
    part = LEDGER["P2-1"]
    for paper, stance in ((0.4, "open"), (1.6, "contradicts"), (-1.6, "contradicts"), (1.5, "open")):
        changed = replace(part, paper=paper)
        hashes = [{part.id: part_hash(changed)}]
        verdict = judge(changed, every_arm(part, {}), "study", 36, 10, hashes=hashes)
        assert (verdict.word, verdict.stance) == ("equivalent within m", stance)


@pytest.mark.parametrize("part", TRAINED, ids=lambda part: part.id)
def test_no_trained_part_is_judged_at_smoke(part):
    verdict = judge(part, every_arm(part, {}), "smoke", 36, 10, hashes=HASHES, device="cpu")
    assert (verdict.word, verdict.stance, verdict.estimate, verdict.p) == ("not judged at smoke", "open", None, None)


def test_exact_parts_are_judged_at_every_profile():
    for profile in judging.PROFILES:
        for part in LEDGER.values():
            if part.kind == "exact":
                assert judge(part, {}, profile, 12, 10).word == "not run"
                held = judge(part, {}, profile, 12, 10, holds=True)
                failed = judge(part, {}, profile, 12, 10, holds=False)
                assert [(v.word, v.stance) for v in (held, failed)] == [("exact", "supports"), ("fails", "contradicts")]


@pytest.mark.parametrize("part", TRAINED, ids=lambda part: part.id)
def test_a_missing_arm_reads_not_run(part):
    arms = every_arm(part, {**TUNED, **HELPED})
    contrast = part.contrast_at(36)
    assert judge(part, {}, "study", 36, 10, hashes=HASHES).word == "not run"
    needed = [*contrast, *(arm for check in part.checks for arm in part.check_arms(check))]
    for arm in needed:
        rest = {name: value for name, value in arms.items() if name != arm}
        verdict = judge(part, rest, "study", 36, 10, hashes=HASHES, device="cpu")
        assert verdict.word == "not run" and arm in verdict.note


def test_other_than_the_ledgers_number_of_seeds_reads_not_run():
    part = LEDGER["A1"]
    for n in (4, 6):
        arms = {arm: answers(0.7, n=n) for arm in part.contrast}
        verdict = judge(part, arms, "cpu", 12, 10, hashes=HASHES)
        assert verdict.word == "not run" and "n = 5" in verdict.note


def test_runs_without_the_entrys_hash_read_not_run():
    part, arms = LEDGER["A1"], every_arm(LEDGER["A1"], {})
    stored = HASHES[0]
    for hashes in ([], [{}], [stored, {}], [stored, stored | {part.key("cpu"): "0" * 16}]):
        assert judge(part, arms, "cpu", 12, 10, hashes=hashes).word == "not run"
    assert judge(part, arms, "cpu", 12, 10, hashes=[stored, stored]).word == "equivalent within m"


@pytest.mark.parametrize("id", ["P2-1", "P2-3", "P2-4", "P5"])
def test_below_36_pairs_the_difference_is_shown_but_not_judged(id):
    verdict = verdict_on(id, {"6x2": 0.2, "6x2+LS": 0.2}, pairs=12)
    assert (verdict.word, verdict.stance, verdict.p) == ("out of scope at this scale", "open", None)
    assert "6x2" in verdict.contrast and verdict.estimate.high < -40


@pytest.mark.parametrize("id", ["H5-supervised", "H5-pretrained"])
def test_the_size_of_a_gain_is_judged_on_imagenet_only(id):
    better = {arm: 0.75 for arm in LEDGER[id].contrast if arm.startswith("hmlp")}
    below = verdict_on(id, {**HELPED, **better})
    assert (below.word, below.stance, below.p) == ("out of scope at this scale", "open", None)
    assert below.estimate.low > 0
    there = verdict_on(id, {**HELPED, **better}, profile="imagenet")
    assert there.text == "same direction"  # 5 points are not 0.34 or 0.38


def test_a1_is_judged_at_the_profiles_own_number_of_pairs_and_says_at_which():
    twelve, thirty_six = (verdict_on("A1", {}, pairs=pairs) for pairs in (12, 36))
    assert (twelve.contrast, twelve.note) == ("6x2+LS - 12x1+LS", "at 12 pairs")
    assert (thirty_six.contrast, thirty_six.note) == ("18x2+LS - 36x1+LS", "at 36 pairs")
    with pytest.raises(UsageError, match="cannot be split"):
        verdict_on("A1", {}, pairs=35)


def test_a_failed_check_makes_the_part_inconclusive_and_is_named():
    cases = {
        "control learned": [
            verdict_on("P2-1", {"36x1": 0.19, "18x2": 0.9}),
            verdict_on("P2-1", {"36x1": 0.96, "18x2": 0.8}),
        ],
        "full beats head": [verdict_on("F1", {**TUNED, "head": 0.745}), verdict_on("F2-full", {**TUNED, "head": 0.9})],
        "pre-training helps": [
            verdict_on(id, {**HELPED, "linear scratch": 0.7})
            for id in ("H4-stems", "H4-linear", "H4-conv", "H4i", "H7")
        ],
    }
    for check, verdicts in cases.items():
        for verdict in verdicts:
            assert verdict.word == f"inconclusive (check failed: {check})"
            assert verdict.stance == "open" and verdict.estimate is not None and verdict.checks[check] is False


def test_twice_chance_is_not_asked_for_on_imagenet():
    assert verdict_on("P2-1", {"36x1": 0.19, "18x2": 0.9}, profile="imagenet").word == "same direction"


def test_interactions_are_differences_of_differences():
    """(78 - 70) - (62 - 60) = 6 points, on the share of these 2,000 images that each accuracy gets right on average."""
    planted = HELPED | {"hmlp pretrained": 0.78, "hmlp scratch": 0.62}
    verdict = verdict_on("H4i", planted)
    assert verdict.contrast == "hmlp pretrained - linear pretrained - hmlp scratch + linear scratch"
    right = {arm: 100 * stats.norm.cdf((a - difficulties()) / NOISE).mean() for arm, a in planted.items()}
    expected = (right["hmlp pretrained"] - right["linear pretrained"]) - (
        right["hmlp scratch"] - right["linear scratch"]
    )
    assert verdict.estimate.mean == pytest.approx(expected, abs=1.0)


def test_tuning_that_does_not_beat_its_parent_is_called_adaptation():
    assert verdict_on("F1", {**TUNED, "trunk": 0.8}).note == "adaptation to a new resolution"
    assert verdict_on("F2-full", {**TUNED, "trunk": 0.75}).note == "adaptation to a new resolution"
    assert verdict_on("F1", {**TUNED, "trunk": 0.7}).note == ""


def test_a_ratio_is_judged_against_1_on_a_named_device():
    part = LEDGER["F3-time"]
    times = {"full": np.array([1.2, 1.21, 1.19, 1.2, 1.22]), "attn": np.array([1.0, 1.01, 0.99, 1.0, 1.0])}
    verdict = judge(part, times, "cpu", 12, 10, hashes=HASHES, device="2 cores")
    assert (verdict.word, verdict.note) == ("same direction", "on 2 cores")
    assert verdict.ours[0] == pytest.approx(1.204, abs=0.001) and 1 < verdict.ours[1] < 1.204 < verdict.ours[2]
    swapped = {"full": times["attn"], "attn": times["full"]}
    assert judge(part, swapped, "cpu", 12, 10, hashes=HASHES, device="x").word == "opposite direction"
    with pytest.raises(UsageError, match="device"):
        judge(part, times, "cpu", 12, 10, hashes=HASHES)


@pytest.mark.parametrize(
    ("id", "two", "one"),
    [
        ("P3", ["W32 6x2", "W64 6x2", "W96 6x2"], ["W32 12x1", "W64 12x1", "W96 12x1"]),
        ("P4", ["6x2", "12x2", "18x2"], ["12x1", "24x1", "36x1"]),
    ],
)
def test_a_planted_slope_is_found_and_swapped_arms_turn_it(id, two, one):
    part, planted = LEDGER[id], (0.66, 0.70, 0.76)
    arms = every_arm(part, dict(zip(two, planted, strict=True)))
    verdict = judge(part, arms, "study", 12, 10, hashes=HASHES)
    assert (verdict.word, verdict.stance) == ("same direction", "supports")
    assert f"from {part.sizes[0]} to {part.sizes[-1]}" in verdict.note
    points = np.stack([100 * (arms[a].mean(1) - arms[b].mean(1)) for a, b in zip(two, one, strict=True)], axis=1)
    x = np.log2(part.sizes)
    per_seed = [np.polyfit(x, y, 1)[0] * (x[-1] - x[0]) for y in points]
    assert verdict.estimate.mean == pytest.approx(np.mean(per_seed)) and verdict.estimate.df == 4
    assert verdict.ours[1:] == pytest.approx(stats.t.interval(0.95, 4, np.mean(per_seed), stats.sem(per_seed)))
    turned = verdict_on(id, dict(zip(one, planted, strict=True)), pairs=12)
    assert (turned.word, turned.stance) == ("opposite direction", "contradicts")
    assert verdict_on(id, dict.fromkeys(two, 0.75), pairs=12).word == "equivalent within m"  # a gain, but no slope


@pytest.mark.parametrize("id", ["P3", "P4"])
def test_a_slope_needs_every_size_and_a_control_that_learned_at_each(id):
    part = LEDGER[id]
    arms = every_arm(part, {})
    needed = [arm for at_size in part.contrasts(12) for arm in at_size]
    assert len(set(needed)) == 2 * len(part.sizes)
    for arm in needed:
        rest = {name: value for name, value in arms.items() if name != arm}
        assert arm in judge(part, rest, "study", 12, 10, hashes=HASHES).note
    assert len(set(part.controls(12))) == len(part.sizes)
    for control in part.controls(12):
        assert verdict_on(id, {control: 0.15}, pairs=12).word == "inconclusive (check failed: control learned)"


@pytest.mark.parametrize("profile", [p for p in judging.PROFILES if p != "imagenet"])
def test_reproduced_is_never_said_below_imagenet(profile):
    for part in OF_POINTS:
        for accuracy in (0.6, 0.7, 0.71, 0.8):
            favoured = {arm: accuracy for arm in (*part.contrast, *part.contrast_at(36)) if part.contrast.get(arm) == 1}
            verdict = verdict_on(part.id, {**TUNED, **HELPED, **favoured}, profile=profile)
            assert "reproduced" not in verdict.text + verdict.word + verdict.stance + verdict.note
    for part in LEDGER.values():
        for holds in (True, False):
            if part.kind == "exact":
                assert "reproduced" not in judge(part, {}, profile, 36, 10, holds=holds).text


def test_imagenet_may_say_reproduced_where_the_papers_difference_lies_in_the_interval():
    def on_imagenet(paper: float, confidence: str, accuracy: float):
        part = replace(LEDGER["P2-1"], paper=paper, paper_confidence=confidence)
        hashes = [{part.id: part_hash(part)}]
        return judge(part, every_arm(part, {"18x2": accuracy}), "imagenet", 36, 1000, hashes=hashes)

    high = on_imagenet(5.0, "read", 0.75).estimate.high
    assert on_imagenet(5.0, "read", 0.75).text == "same direction (reproduced)"
    assert on_imagenet(high + 0.05, "read", 0.75).text == "same direction"
    assert on_imagenet(high + 0.05, "read-chart", 0.75).text == "same direction (reproduced)"
    assert on_imagenet(high + 0.15, "read-chart", 0.75).text == "same direction"
    assert on_imagenet(5.0, "read", 0.65).text == "opposite direction (not reproduced)"
    assert on_imagenet(5.0, "read", 0.75).margin == 0.3


def test_a_claim_is_as_strong_as_its_weakest_part():
    win, lose = ([verdict_on(f"P2-{k}", {"18x2": x}) for k in (1, 3, 4)] for x in (0.75, 0.65))
    tie = verdict_on("P2-4", {})
    assert judging.claim_stance(win) == "supports"
    assert judging.claim_stance([*win[:2], lose[2]]) == "contradicts"
    assert judging.claim_stance([*win[:2], tie]) == "open (P2-4)"
    assert judging.claim_stance(win[:1]) == "open (P2-3, P2-4)"
    with pytest.raises(UsageError, match="one claim"):
        judging.claim_stance([win[0], verdict_on("A1", {})])


def test_the_table_has_a_row_a_verdict_and_adjusts_p_within_a_profile():
    verdicts = [
        verdict_on("P2-1", {"18x2": 0.71}),
        verdict_on("P2-3", {"18x2": 0.71}),
        verdict_on("A1", {}),
        verdict_on("A1", {}, profile="cpu", pairs=12),
        verdict_on("P5", {}, pairs=12),
        judge(LEDGER["P1"], {}, "study", 36, 10, holds=True),
    ]
    table = judging.verdict_table(verdicts)
    assert (
        list(table.columns)
        == (
            "part claim title notebook contrast test n test_images ours sd low high seed_se image_se paired_low paired_high "
            "paper paper_source paper_confidence margin p p_holm checks verdict stance smallest_visible seeds_needed note runs"
        ).split()
    )
    first, e = table.iloc[0], verdicts[0].estimate
    assert (first["n"], first["test_images"], first["ours"]) == (5, 2000, e.mean)
    assert first["seed_se"] ** 2 + first["image_se"] ** 2 == pytest.approx(e.se**2)
    by_seed = [
        100 * (a.mean() - b.mean())
        for a, b in zip(*map(every_arm(LEDGER["P2-1"], {"18x2": 0.71}).get, ("18x2", "36x1")), strict=True)
    ]
    assert first["sd"] == pytest.approx(np.std(by_seed, ddof=1)) and first["checks"] == "control learned: passed"
    assert list(table["part"]) == ["P2-1", "P2-3", "A1", "A1", "P5", "P1"]
    assert list(table["p_holm"][:3]) == pytest.approx(list(statistics.holm([v.p for v in verdicts[:3]])))
    assert table["p_holm"][3] == pytest.approx(verdicts[3].p)  # alone in its profile
    assert table["p_holm"].isna().tolist() == [False] * 4 + [True] * 2
    part_of_it = judging.verdict_table(verdicts[:1], family=verdicts)
    assert part_of_it["p_holm"][0] == pytest.approx(table["p_holm"][0])
    assert len(judging.verdict_table([])) == 0


def test_arms_of_different_images_are_refused():
    arms = {"6x2+LS": answers(0.7, images=100), "12x1+LS": answers(0.7, images=99)}
    with pytest.raises(UsageError, match="same seeds and images"):
        judge(LEDGER["A1"], arms, "cpu", 12, 10, hashes=HASHES)


# ---- The ledger ----


def test_the_ledger_has_every_part():
    counts = {claim: sum(part.claim == claim for part in LEDGER.values()) for claim in PARTS}
    assert counts == PARTS and len(LEDGER) == sum(PARTS.values())
    room = {"P": "31", "A": "31", "F": "41", "B": "21"}
    own = {"P3": "32", "P4": "33", "P6": "35", "P7": "36", "F5": "42", "F6": "42", "H1": "51", "H2": "51"}
    for part in LEDGER.values():
        assert part.notebook == own.get(part.claim, room.get(part.claim[0], "52")), part.id


@pytest.mark.parametrize("part", LEDGER.values(), ids=lambda part: part.id)
def test_every_check_is_known_and_coefficients_add_up_to_0(part):
    assert set(part.checks) <= set(CHECKS)
    assert sum(part.contrast.values()) == 0
    if part in OF_POINTS:
        assert (part.margin_imagenet, part.n) == (0.3, 5) and 0.5 <= part.margin <= 1.5


def test_the_checks_are_those_that_were_fixed():
    with_check = {check: {p.claim for p in TRAINED if check in p.checks} for check in CHECKS}
    assert with_check["pre-training helps"] == {"H4", "H4i", "H7"}
    assert with_check["full beats head"] == {"F1", "F2", "F5"}
    assert with_check["control learned"] == {part.claim for part in OF_POINTS}


def test_the_hash_changes_with_every_field_and_with_nothing_else():
    part = LEDGER["H4i"]
    other = {
        "id": "x", "claim": "x", "title": "x", "notebook": "41", "kind": "equivalence", "metric": "x", "scope": "any",
        "contrast": {"a": 1.0}, "sizes": (1, 2), "margin": 1.4, "margin_imagenet": 0.2, "images": "all", "n": 6, "min_pairs": 36,
        "checks": (), "control": "x", "parent": "x", "paper": 0.1, "paper_source": "x", "paper_confidence": "read",
        "expected": "0", "profiles": ("gpu",), "at": {"gpu": {"margin": 1.0}},
    }  # fmt: skip
    assert set(other) == {f.name for f in fields(part)}
    hashes = [part_hash(part), *(part_hash(replace(part, **{key: value})) for key, value in other.items())]
    assert len(set(hashes)) == len(hashes)
    turned = dict(reversed(part.contrast.items()))
    assert part_hash(replace(part, contrast=turned)) == part_hash(part)
    own = {part.key(profile): part_hash(part.entry(profile)) for part in LEDGER.values() for profile in part.at}
    assert ledger_hashes() == {id: part_hash(replace(part, at={})) for id, part in LEDGER.items()} | own


def test_a_key_of_one_profile_changes_what_is_fixed_for_that_profile_alone(tmp_path):
    text = (paths.PAPER / "claims.toml").read_text()
    (tmp_path / "claims.toml").write_text(f"{text}\n[A1.gpu]\nmargin = 0.7\n")
    changed = ledger(tmp_path / "claims.toml")["A1"]
    assert ledger_hashes(tmp_path / "claims.toml").items() >= ledger_hashes().items() - {("A1 at gpu", None)}
    arms = every_arm(changed, {})
    before = [{changed.id: part_hash(LEDGER["A1"].entry("study"))}]
    assert judge(changed, arms, "study", 12, 10, hashes=before).margin == LEDGER["A1"].at_profile("study").margin
    assert judge(changed, arms, "study", 12, 10, hashes=before).word == "equivalent within m"
    assert judge(changed, arms, "gpu", 12, 10, hashes=before).word == "not run"  # made before gpu's margin was fixed
    there = judge(changed, arms, "gpu", 12, 10, hashes=[ledger_hashes(tmp_path / "claims.toml")])
    assert (there.word, there.margin) == ("equivalent within m", 0.7)
    for wrong in (
        "[A1.gpu]\nmargni = 1\n",
        "[A1.gpu]\nn = 3\n",
        "[A1.gpu]\nmargin = -1\n",
    ):
        (tmp_path / "claims.toml").write_text(f"{text}\n{wrong}")
        with pytest.raises(UsageError, match="ledger entry A1"):
            ledger(tmp_path / "claims.toml")


def test_parts_of_other_profiles_do_not_hold_a_claim_open():
    only = replace(LEDGER["P2-4"], profiles=("gpu",))
    entries = LEDGER | {"P2-4": only}
    won = [verdict_on(f"P2-{k}", {"18x2": 0.75}) for k in (1, 3)]
    assert judging.claim_stance(won, entries) == "supports"
    assert judging.claim_stance([replace(v, profile="gpu") for v in won], entries) == "open (P2-4)"


@pytest.mark.parametrize("data, counts", scale("study").transfer_images.items())
def test_the_parts_on_transfer_are_at_the_sizes_that_claims_md_fixes(data, counts):
    """F5: attn - full at the fewest images; F6: full - attn at the most, smallest width, and its slope over width."""
    few, most = (f"{data} {counts[i]}" for i in (0, -1))
    f5, f6, slope = (LEDGER[id] for id in (f"F5-{data}", f"F6-{data}", f"F6-{data}-slope"))
    assert (f5.kind, f6.kind, slope.kind) == ("non-inferiority", "superiority", "slope")
    assert f5.contrast == {f"W64 {few} attn": 1, f"W64 {few} full": -1} and f5.images == counts[0]
    assert f6.contrast == {f"W32 {most} full": 1, f"W32 {most} attn": -1}
    assert (slope.contrast, slope.sizes) == ({f"W64 {most} attn": 1, f"W64 {most} full": -1}, (32, 64))
    assert slope.contrasts(12)[0] == {f"W32 {most} attn": 1, f"W32 {most} full": -1}
    assert f6.images == slope.images == counts[-1]
    assert f5.check_arms("full beats head") == (f"W64 {few} full", f"W64 {few} head")


def test_a_check_takes_the_arms_of_the_notebook_or_of_the_controls_own_setting():
    assert LEDGER["F1"].check_arms("full beats head") == ("full", "head")
    assert LEDGER["H7"].check_arms("pre-training helps") == ("linear pretrained", "linear scratch")
    part = LEDGER["F5-digits"]
    right = {"W64 digits 100 full": 0.75, "W64 digits 100 attn": 0.75}
    passed = judge(part, every_arm(part, {**right, "W64 digits 100 head": 0.6}, 0.75), "study", 12, 10, hashes=HASHES)
    failed = judge(part, every_arm(part, {**right, "W32 digits 100 head": 0.6}, 0.75), "study", 12, 10, hashes=HASHES)
    assert passed.word == "not inferior by m"
    assert failed.word == "inconclusive (check failed: full beats head)"


GOOD = (paths.PAPER / "claims.toml").read_text()


@pytest.mark.parametrize(
    "old, new, says",
    [
        ('kind = "superiority"', 'kind = "superiorty"', "did you mean 'superiority'"),
        ('"36x1" = -1', '"36x1" = -2', "do not add up to 0"),
        ('claim = "P2"\n', "", "P2-1 lacks the key 'claim'"),
        ('control = "36x1"\n', "", "lacks the key 'control'"),
        ("margin = 1.5\n", "", "lacks the key 'margin'"),
        ("margin = 1.5", 'margin = "1.5"', "allowed is a number above 0"),
        ("margin = 1.5", "margn = 1.5", "did you mean 'margin'"),
        ("n = 5", "n = 1", "allowed is a whole number from 2"),
        ('["control learned"]', '["control learnt"]', "did you mean 'control learned'"),
        ('["control learned"]', "[]", "lacks the check 'control learned'"),
        ('scope = "trained"', 'scope = "all"', "unknown scope"),
        ('paper_source = "A, Table 2"\n', "", "lacks the key 'paper_source'"),
        ("n = 5", "n = ", "not valid TOML"),
        ("[P2-1]", "P9 = 3\n[P2-1]", "unknown key in ledger entry P1: 'P9'"),
        ("[B1-Ti]", "P9 = 3\n[B1-Ti]", "'P9' is not a table"),
        ("sizes = [32, 64, 96]", "sizes = [32, 96, 64]", "allowed is a list of two or more whole numbers, rising"),
        ("sizes = [32, 64, 96]\n", "", "P3 of kind 'slope' lacks the key 'sizes'"),
    ],
)
def test_a_malformed_entry_is_refused_in_one_sentence(tmp_path, old, new, says):
    assert old in GOOD
    path = tmp_path / "claims.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        ledger(path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "id, change, says",
    [
        ("P2-1", {"contrast": {"18x3": 1.0, "36x1": -1.0}}, "notebook 31_fig1_branches in ledger entry P2-1: '18x3'"),
        ("P3", {"sizes": (32, 48, 96)}, "notebook 32_fig2_width in ledger entry P3: 'W48 6x2'"),
        ("A1", {"control": "x"}, "notebook 31_fig1_branches in ledger entry A1: 'x'"),
        ("F1", {"notebook": "43"}, "unknown notebook '43'"),
    ],
)
def test_an_arm_or_notebook_that_does_not_exist_is_named_in_one_sentence_when_its_part_is_judged(id, change, says):
    with pytest.raises(UsageError, match=re.escape(says)) as error:
        evidence.verdict(evidence.Stored(scale("study")), replace(LEDGER[id], **change))
    assert "\n" not in str(error.value)


def test_a_ledger_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no\.toml cannot be read"):
        ledger(tmp_path / "no.toml")


# ---- The pilot


def test_the_pilots_claims_table_and_the_cells_of_its_tables_come_out_of_its_runs(capsys):
    assert pilot.main() == 0
    said = capsys.readouterr().out
    assert "51 parts recomputed from their runs: 0 cells of claims.csv differ" in said
    assert "221 cells of the tables recomputed: 0 differ" in said


def test_a_changed_cell_of_the_pilot_is_named(tmp_path, monkeypatch):
    kept = paths.REFERENCE / "pilot"
    for name in ("runs.jsonl", "arms.csv", "claims.toml"):
        (tmp_path / name).symlink_to(kept / name)
    (tmp_path / "tables").mkdir()
    (tmp_path / "claims.csv").write_text((kept / "claims.csv").read_text().replace(",-0.12,0.766", ",-0.13,0.766"))
    table = (kept / "tables" / "31_fig1_branches.csv").read_text()
    (tmp_path / "tables" / "31_fig1_branches.csv").write_text(table.replace("83.58 ± 0.28", "83.58 ± 0.29"))
    changed = evidence.Archived(tmp_path, scale("study"))
    monkeypatch.setattr(exact, "holds", lambda part: part.id != "P6-memory")  # counted once above
    assert [line.partition(":")[0] for line in pilot.claims(changed)[1]] == ["P2-1, ours"]
    assert any("6x2+LS" in line and "committed 83.58 ± 0.29" in line for line in pilot.printed_cells(changed)[1])


def test_the_command_shows_the_pilots_verdicts(monkeypatch, capsys):
    monkeypatch.setattr(exact, "holds", lambda part: part.id != "P6-memory")
    assert main(["claims", "--pilot"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    kept = pd.read_csv(paths.REFERENCE / "pilot" / "claims.csv")
    assert [row[0] for row in rows[2:]] == list(kept["part"])
    assert [row[-1] for row in rows[2:]] == list(kept["stance"])


def test_an_archive_is_judged_without_torch():
    code = (
        "import sys\n"
        "from lab import paths\nfrom lab.claims import evidence\nfrom lab.experiments.profiles import profile\n"
        "pilot = evidence.Archived(paths.REFERENCE / 'pilot', profile('study'))\n"
        "found = evidence.verdicts(pilot, [part for part in pilot.parts() if part.kind != 'exact'])\n"
        "print(len([v for v in found if v.estimate]), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT, check=False)
    assert done.stdout == "33 False\n", done.stderr


# ---- The paper's numbers ----


def paper_csv(name: str) -> pd.DataFrame:
    table = pd.read_csv(paths.PAPER / f"{name}.csv", dtype={"source": str})
    assert set(table["source"]) <= set("ANBCDEF") and set(table["confidence"]) <= {"read", "read-chart", "computed"}
    return table


def test_the_papers_tables_have_all_their_rows():
    rows = {"figure1": 12, "figure4": 3, "table5": 12, "table7": 10}
    assert {name: len(paper_csv(name)) for name in rows} == rows
    assert not paper_csv("table5").duplicated(["model", "dataset", "optimizer"]).any()
    figure1 = paper_csv("figure1")
    parts = figure1["model"].str.extract(r"([BS])(\d+)x(\d+)")
    assert (parts[2].astype(int) == figure1["branches"]).all()
    assert (
        "ViT-" + parts[0] + (parts[1].astype(int) * parts[2].astype(int)).astype(str) == figure1["model_family"]
    ).all()


def test_the_ledgers_differences_are_those_of_the_papers_tables():
    t7 = paper_csv("table7").set_index(["stem", "norm", "act", "model"])
    stem = {
        "linear": ("linear", "none", "none", "ViT-B12"),
        "conv": ("conv", "bn", "gelu", "ViT-B12"),
        "hmlp": ("hmlp", "bn", "gelu", "ViT-B12"),
        "hmlp-ln": ("hmlp", "ln", "gelu", "ViT-B12"),
    }
    t5 = paper_csv("table5").set_index(["model", "dataset", "optimizer"]).loc[("ViT-B", "val", "AdamW")]
    f4 = paper_csv("figure4").set_index("panel")
    t6 = paper_csv("table6").set_index(["dataset", "model"])
    sizes = {
        "W32": "ViT-S",
        "W64": "ViT-B",
        "W96": "ViT-S",
        "W192": "ViT-S",
        "W384": "ViT-S",
        "W768": "ViT-B",
        "W1024": "ViT-L",
    }
    entries = [part.entry(profile) for part in LEDGER.values() for profile in ("cpu", *part.at)]
    for part in entries:
        if part.paper is None:
            continue
        if part.notebook == "36":
            continue
        if part.notebook == "42" and part.kind == "slope":
            gaps = [t6.loc[(next(iter(part.contrast)).split()[1], m)] for m in ("ViT-S", "ViT-B", "ViT-L")]
            change = statistics.slope(np.array([[row["attn"] - row["full"] for row in gaps]] * 2), part.sizes).mean
            assert part.paper == pytest.approx(change, abs=5e-3), part.id
            continue
        if part.kind == "slope":
            chart = paper_csv({"P3": "figure2", "P4": "figure3"}[part.id])
            chart = chart[chart["model_family"] == "ViT-B"] if part.id == "P4" else chart[chart["layer_scale"] == "no"]
            chart = chart.pivot(index="pairs" if part.id == "P4" else "width", columns="branches", values="top1")
            change = statistics.slope(np.stack([(chart[2] - chart[1]).to_numpy()] * 2), list(chart.index)).mean
            assert part.paper == pytest.approx(change, abs=5e-3), part.id
            continue
        if part.notebook == "21":
            t8 = paper_csv("table8").set_index(["procedure", "model"])["top1"]
            cells = {a: t8["DeiT" if "DeiT" in a else "this paper", "ViT-" + a.split("12")[0]] for a in part.contrast}
        elif part.notebook == "35":
            t3 = paper_csv("table3").set_index("model")["top1"]
            like = {"W64 36x1+LS": "B36x1", "W64 18x2+LS": "B18x2", "W96 16x1+LS": "L24x1"}
            like |= {"W192 36x1+LS": "B36x1", "W192 18x2+LS": "B18x2", "W288 16x1+LS": "L24x1"}
            cells = {a: t3[like.get(a, a)] for a in part.contrast}
        elif part.notebook == "52":
            cells = {a: t7.loc[stem[a.split()[0]], f"{a.split()[1]}_top1"] for a in part.contrast}
        elif part.kind == "ratio" and part.notebook == "41":
            row = f4.loc[{"time_s": "latency", "mem_mb": "peak memory"}[part.metric]]
            assert part.paper == pytest.approx(row["full"] / row["attn"], abs=5e-4)
            continue
        elif part.notebook == "41":
            cells = t5
        elif part.notebook == "42":
            own = next(iter(part.contrast)).split()[1]  # one of the paper's sets, or one of ours that stands beside one
            named = {"Cars": "stanford-cars", "Flowers": "flowers-102", "Nat": "inaturalist-2019"}
            data = (
                own
                if own in set(t6.index.get_level_values(0)) and "ViT" not in part.paper_source
                else next(d for word, d in named.items() if word in part.paper_source)
            )
            # F5 stands at our one width beside the paper's smallest model
            model = sizes | ({"W64": "ViT-S"} if part.claim == "F5" else {})
            cells = {arm: t6.loc[(data, model[arm.split()[0]]), arm.split()[-1]] for arm in part.contrast}
        else:
            continue
        assert part.paper == pytest.approx(sum(c * cells[arm] for arm, c in part.contrast.items()), abs=1e-9), part.id


def test_figure_4_saves_what_its_own_bars_say_and_the_text_says_less():
    f4 = paper_csv("figure4")
    computed = 100 * (1 - f4["attn"] / f4["full"])
    assert list(f4["saving_percent"]) == pytest.approx(list(computed), abs=0.4)
    assert list(f4["text_percent"]) == [66, 10, 10]


# ---- Tuning: rates and margins

STUDY = scale("study")


@functools.cache
def at_study(table):
    return arms_of(table, STUDY)


PILOT = paths.REFERENCE / "pilot"


def pretend(monkeypatch, made):
    """Only the runs of `made` are finished: hash -> top-1."""

    def find(spec):
        return Result(spec.hash, {"top1": made[spec.hash]}, None, {}, {}) if spec.hash in made else None

    monkeypatch.setattr(store, "find", find)


def test_every_arm_of_a_group_tries_the_same_three_rates_on_tuning_seeds_and_differs_in_nothing_else():
    for name, group in tuning.GROUPS.items():
        arms = at_study(group.table)
        found = group.specs(STUDY)
        assert {(arm, lr, spec.seed) for arm, lr, spec in found} == {
            (arm, lr, seed) for arm in group.arms for lr in group.rates for seed in tuning.SEEDS
        }, name
        assert len(group.rates) == 3 and list(group.rates) == sorted(group.rates)
        for arm, lr, spec in found:
            own = arms[arm].spec.with_seed(spec.seed)
            assert spec == replace(own, recipe=replace(own.recipe, lr=lr)) and spec.split == "validation"


def test_the_rate_of_each_group_is_one_of_its_three_and_the_one_that_all_its_arms_are_judged_at():
    for group in tuning.GROUPS.values():
        rates = {at_study(group.table)[arm].spec.recipe.lr for arm in group.arms}
        assert len(rates) == 1 and rates < set(group.rates)


def test_the_committed_rates_are_the_best_of_the_committed_tuning():
    table = pd.read_csv(PILOT / "tuning.csv")
    assert set(table["group"]) == set(tuning.GROUPS)
    for name, rows in table.groupby("group"):
        group = tuning.GROUPS[name]
        means = rows.groupby("lr")["top1_validation"].mean()
        assert set(means.index) == set(group.rates) and set(rows["arm"]) == set(group.arms)
        assert rows.loc[rows["chosen"].astype(bool), "lr"].unique() == [means.idxmax()]
        arms = at_study(group.table)
        assert {arms[arm].spec.recipe.lr for arm in group.arms} == {means.idxmax()}, name


def test_the_margins_of_the_study_are_a_tenth_of_the_measured_errors():
    table = pd.read_csv(PILOT / "margins.csv").set_index("part")
    for id, row in table.iterrows():
        tenth = min(max(round(row["error_validation"] / 10, 2), 0.5), 1.5)
        assert ledger()[id].at_profile("study").margin == row["margin"] == tenth, id
    judged = pd.read_csv(PILOT / "claims.csv", dtype={"runs": str}).set_index("part")
    for id in judged.index[judged["runs"].notna()]:
        assert id in table.index or ledger()[id].at_profile("study").margin == 1.5, id


def test_the_best_rate_is_that_of_the_highest_mean_over_arms_and_of_equals_the_lowest():
    found = {("a", 1.0): [80, 82], ("a", 2.0): [85, 85], ("b", 1.0): [70, 70], ("b", 2.0): [60, 60]}
    assert tuning.best(found) == 1.0
    assert tuning.best({("a", 2.0): [80], ("a", 1.0): [80]}) == 1.0


def test_the_table_says_what_was_found_and_chooses_only_when_all_is_there(monkeypatch):
    group = tuning.GROUPS["supervised"]
    accuracy = {(arm, lr): 80 + i for i, (arm, lr) in enumerate((a, r) for r in group.rates for a in group.arms)}
    made = {spec.hash: accuracy[arm, lr] for arm, lr, spec in group.specs(STUDY)}

    pretend(monkeypatch, made)
    rows = pd.DataFrame(tuning.table(STUDY, {"supervised": group}))
    assert len(rows) == 6 and (rows["n"] == 2).all() and set(rows.loc[rows["chosen"], "lr"]) == {group.rates[-1]}
    made.pop(next(spec.hash for _, _, spec in group.specs(STUDY)))
    rows = pd.DataFrame(tuning.table(STUDY, {"supervised": group}))
    assert len(rows) == 5 and rows["chosen"].isna().all()


def test_groups_are_chosen_by_name_or_by_their_first_word():
    assert list(tuning.groups(["resolution"])) == [f"resolution {s}" for s in ("full", "attn", "ffn", "head")]
    assert list(tuning.groups([])) == list(tuning.GROUPS)
    with pytest.raises(UsageError, match="unknown tuning group 'supervise'"):
        tuning.groups(["supervise"])


def test_table_6_is_tuned_on_every_target_at_the_widths_that_are_judged_there():
    arms = {arm for name, group in tuning.GROUPS.items() if name.startswith("transfer") for arm in group.arms}
    judged = {
        arm
        for part in ledger().values()
        if part.claim in ("F5", "F6") and part.belongs("study")
        for arm in part.arms(12)
    }
    assert judged <= arms
    # An arm that is not tuned has the rate of width 64 at the same images, or of its strategy at the middle number of them.
    made = at_study(small.transfer)
    for name in set(made) - arms:
        _, data, images, strategy = name.replace("scratch", "full").split()
        near = f"W64 {data} {images} {strategy}", f"W64 {data} {STUDY.transfer_images[data][1]} {strategy}"
        like = next(arm for arm in near if arm in arms)
        assert made[name].spec.recipe.lr == made[like].spec.recipe.lr, name


def test_the_committed_contrasts_at_the_best_rates_come_out_of_the_committed_tuning():
    tuned = pd.read_csv(PILOT / "tuning.csv", dtype={"notebook": str}).astype({"chosen": bool})
    shown = pd.read_csv(PILOT / "best_rates.csv").set_index("part")
    for id, row in shown.iterrows():
        part = ledger()[id].at_profile("study")
        mine = tuned[tuned["notebook"] == part.notebook]
        best = mine.groupby("arm")["top1_validation"].max()
        common = mine[mine["chosen"]].set_index("arm")["top1_validation"]
        contrasts = part.contrasts(max(12, part.min_pairs))
        for top1, column in ((common, "at_the_common_rate"), (best, "at_each_best")):
            points = [sum(c * top1[arm] for arm, c in contrast.items()) for contrast in contrasts]
            expected = points[0]
            if part.sizes:
                x = np.log2(part.sizes)
                expected = np.polyfit(x, points, 1)[0] * np.ptp(x)
            assert row[column] == pytest.approx(expected), (id, column)
