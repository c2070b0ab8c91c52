"""Intervals over seeds and test images, p-values, and the smallest difference that a run could have seen.

S seeds, N test images; a difference of accuracies is in percentage points everywhere.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from vitlib.errors import UsageError
from vitlib.stats import Estimate, difference, interval, over_seeds

__all__ = [
    "Estimate", "difference", "holm", "interval", "over_seeds", "p_value", "prints_as", "seeds_needed", "slope",
    "smallest_visible",
]  # fmt: skip

UNREACHABLE = "not reachable with this test set"
MOST_SEEDS = 2**40
CHART_ERROR = 0.1  # points; how far a value read off one of the paper's charts may be wrong


def slope(values: np.ndarray, sizes: Sequence[float], level: float = 0.95) -> Estimate:
    """Change from the smallest to the largest size: values (S, K) in points at K sizes, a line on log2 per seed."""
    values, x = np.asarray(values, dtype=np.float64), np.log2(np.asarray(sizes, dtype=np.float64))
    if values.ndim != 2 or values.shape[1] != len(x) or len(set(x)) < 2:
        raise UsageError(f"a slope needs values (seeds, sizes) at two or more sizes, not {values.shape} at {len(x)}")
    centred = x - x.mean()
    return over_seeds(values @ centred / (centred**2).sum() * np.ptp(x), level)


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
    """Holm's adjusted p of one family of tests."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(p, method="holm")[1] if len(p) else np.array([])


def smallest_visible(estimate: Estimate) -> float:
    """The smallest difference that this run could have seen: at 5 %, with a power of 80 %."""
    return float((stats.t.ppf(0.975, estimate.df) + stats.t.ppf(0.80, estimate.df)) * estimate.se)


def seeds_needed(estimate: Estimate, paper: float) -> int | str:
    """The fewest seeds at which `paper` would be a visible difference on the same number of test images."""
    ms_s, _, ms_r = estimate.mean_squares
    N, image_term = estimate.images, estimate.image_term

    def visible(n: int) -> bool:
        # The variance components stay, so of the mean squares only MS_I grows with n.
        mean_squares = (ms_s, ms_r + n * N * image_term, ms_r)
        return smallest_visible(replace(estimate, n=n, mean_squares=mean_squares)) <= abs(paper)

    # With ever more seeds only the image term is left, at N - 1 degrees of freedom.
    t = stats.t.ppf(0.975, N - 1) + stats.t.ppf(0.80, N - 1) if image_term else 0.0
    if t * math.sqrt(image_term) >= abs(paper) or not visible(MOST_SEEDS):
        return UNREACHABLE
    return 2 + bisect.bisect_left(range(2, MOST_SEEDS), True, key=visible)
