"""Intervals over seeds and test images, p-values, and the smallest difference that a run could have seen.

S seeds, N test images; a difference of accuracies is in percentage points everywhere.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from vitlib.stats import Estimate

MOST_SEEDS = 2**40
CHART_ERROR = 0.1  # points; how far a value read off one of the paper's charts may be wrong


def prints_as(value: float, printed: str) -> bool:
    """Whether `value`, rounded to the digits that the paper prints, reads as printed: 17.583 prints as "17.58"."""
    return f"{value:.{len(printed.partition('.')[2])}f}" == printed


def p_value(kind: str, estimate: Estimate, m: float | None) -> float:
    """Raw p of the named test: two-sided against 0, the larger of two one-sided, or one-sided against -m."""
    if kind == "equivalence":
        return max(_tail(estimate.mean + m, estimate), _tail(m - estimate.mean, estimate))
    if kind == "non-inferiority":
        return _tail(estimate.mean + m, estimate)
    return min(1.0, 2 * _tail(abs(estimate.mean), estimate))


def _tail(distance: float, estimate: Estimate) -> float:
    if estimate.se == 0:  # every seed and image agrees
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / estimate.se, estimate.df))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p of one family of tests. Our own: statsmodels' collects all garbage at each call, half a second."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def tightest(estimate: Estimate) -> float:
    """The smallest margin at which two one-sided tests at 5 % pass."""
    return max(map(abs, estimate.bounds(0.90)))


def prediction(estimate: Estimate, n: int) -> tuple[float, float]:
    """Where the mean over n new seeds falls with 95 %, on the same test images: t with the estimate's seeds."""
    half = stats.t.ppf(0.975, estimate.n - 1) * estimate.sd * math.sqrt(1 / estimate.n + 1 / n)
    return float(estimate.mean - half), float(estimate.mean + half)


def flat_part(top1: Mapping[float, Mapping[int, float]]) -> tuple[float, ...]:
    """Of a curve of tuning, rate -> seed -> accuracy: the best rate of those with most seeds (of equals the lowest), and its
    neighbours whose paired deficit to it lies within its standard error.
    """
    rates, most = sorted(top1), max(map(len, top1.values()))
    best = max((lr for lr in rates if len(top1[lr]) == most), key=lambda lr: (np.mean([*top1[lr].values()]), -lr))

    def level(lr: float) -> bool:
        deficit = [top1[best][seed] - top1[lr][seed] for seed in top1[best].keys() & top1[lr].keys()]
        return np.mean(deficit) <= np.std(deficit, ddof=1) / math.sqrt(len(deficit))

    low = high = rates.index(best)
    while low > 0 and level(rates[low - 1]):
        low -= 1
    while high + 1 < len(rates) and level(rates[high + 1]):
        high += 1
    return tuple(rates[low : high + 1])


def middle(flat: Sequence[float]) -> float:
    """The middle rate of a flat part; of two the lower."""
    return flat[(len(flat) - 1) // 2]


def smallest_visible(estimate: Estimate) -> float:
    """The smallest difference that this run could have seen: at 5 %, with a power of 80 %."""
    return float((stats.t.ppf(0.975, estimate.df) + stats.t.ppf(0.80, estimate.df)) * estimate.se)


def seeds_needed(estimate: Estimate, paper: float) -> int | str:
    """The fewest seeds at which `paper` would be a visible difference on the same number of test images."""

    def visible(n: int) -> bool:
        return smallest_visible(estimate.with_seeds(n)) <= abs(paper)

    if not visible(MOST_SEEDS):  # the image term alone is too large
        return "not reachable with this test set"
    return 2 + bisect.bisect_left(range(2, MOST_SEEDS), True, key=visible)
