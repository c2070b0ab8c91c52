"""Differences of accuracies with their intervals: seeds and test images are both random.

S seeds, N test images; a difference of accuracies is in percentage points everywhere. scipy, of the extra `own`, is
imported where a quantile is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from vitlib.errors import UsageError, need


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and test images with its uncertainty, in points (natural logarithm for a ratio)."""

    mean: float
    mean_squares: tuple[float, float, float]  # MS_S, MS_I, MS_R: seeds, images, residual
    n: int  # seeds or process restarts
    images: int  # 1 = the seed is the unit: Student's t over seeds
    level: float = 0.95

    @property
    def sd(self) -> float:
        """Sample standard deviation over seeds of the mean difference of each seed."""
        return math.sqrt(self.mean_squares[0] / self.images)

    @property
    def seed_term(self) -> float:
        """The part of SE^2 that more seeds shrink: seed effects and residual, MS_S / (n N)."""
        return self.mean_squares[0] / (self.n * self.images)

    @property
    def image_term(self) -> float:
        """The part of SE^2 that only more test images shrink, (MS_I - MS_R) / (n N); none below 0."""
        _, ms_i, ms_r = self.mean_squares
        return max(ms_i - ms_r, 0.0) / (self.n * self.images)

    @property
    def se(self) -> float:
        """SE^2 = max(MS_S + MS_I - MS_R, MS_S) / (n N)."""
        return math.sqrt(self.seed_term + self.image_term)

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom of SE^2, at least n - 1:

        (MS_S + MS_I - MS_R)^2 / (MS_S^2/(n-1) + MS_I^2/(N-1) + MS_R^2/((n-1)(N-1))). The numerator is the sum that SE^2
        uses, so where SE^2 falls back on MS_S this gives n - 1.
        """
        (ms_s, ms_i, ms_r), n = self.mean_squares, self.n
        spread = ms_s**2 / (n - 1)
        if self.images > 1:
            spread += ms_i**2 / (self.images - 1) + ms_r**2 / ((n - 1) * (self.images - 1))
        return max(max(ms_s + ms_i - ms_r, ms_s) ** 2 / spread, n - 1) if spread > 0 else float(n - 1)

    @property
    def low(self) -> float:
        return self.bounds(self.level)[0]

    @property
    def high(self) -> float:
        return self.bounds(self.level)[1]

    @property
    def paired(self) -> tuple[float, float]:
        """Paired t over seeds alone, which takes the test images as fixed. Shown beside; decides nothing."""
        half = t_quantile(0.5 + self.level / 2, self.n - 1) * math.sqrt(self.seed_term)
        return float(self.mean - half), float(self.mean + half)

    def bounds(self, level: float) -> tuple[float, float]:
        """The two-sided interval at another level; 0.90 holds two one-sided tests at 5 % each."""
        half = t_quantile(0.5 + level / 2, self.df) * self.se
        return float(self.mean - half), float(self.mean + half)

    def with_seeds(self, n: int) -> Estimate:
        """What n seeds would give if the mean and the components of variance stay: of the mean squares only MS_I grows."""
        ms_s, _, ms_r = self.mean_squares
        return replace(self, n=n, mean_squares=(ms_s, ms_r + n * self.images * self.image_term, ms_r))


def interval(D: np.ndarray, level: float = 0.95) -> Estimate:
    """Mean of D (S, N) with seeds and test images both random: differences of correctness, 1 = 100 points."""
    D = 100.0 * np.asarray(D, dtype=np.float64)
    if D.ndim != 2 or D.shape[0] < 2 or D.shape[1] < 2:
        raise UsageError(f"an interval needs differences of shape (seeds, images), two or more each, not {D.shape}")
    n, N = D.shape
    rows, columns, mean = D.mean(axis=1, keepdims=True), D.mean(axis=0, keepdims=True), D.mean()
    ms_s = N * ((rows - mean) ** 2).sum() / (n - 1)
    ms_i = n * ((columns - mean) ** 2).sum() / (N - 1)
    ms_r = ((D - rows - columns + mean) ** 2).sum() / ((n - 1) * (N - 1))
    return Estimate(float(mean), (float(ms_s), float(ms_i), float(ms_r)), n, N, level)


def over_seeds(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
    """Student's t over one value per seed (or process restart): (S,), in the unit of the values."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UsageError(f"Student's t needs one value for each of two seeds or more, not shape {values.shape}")
    return Estimate(float(values.mean()), (float(values.var(ddof=1)), 0.0, 0.0), len(values), 1, level)


def t_quantile(level: float, df: float) -> float:
    """Student's t below which a share `level` lies. Raises UsageError where scipy is absent."""
    need("scipy", "own")
    from scipy import stats

    return float(stats.t.ppf(level, df))


def difference(correct: Mapping[str, np.ndarray], contrast: Mapping[str, float]) -> np.ndarray:
    """D = sum over arms of c_a x correct[a], of the shape of its arms."""
    shapes = {arm: np.shape(correct[arm]) for arm in contrast}
    if len(set(shapes.values())) != 1:
        raise UsageError(f"the arms of one contrast must have the same seeds and images, not {shapes}")
    return sum(c * np.asarray(correct[arm], dtype=np.float64) for arm, c in contrast.items())


def wilson(correct: int, images: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy over test images, in percent."""
    z, share = NormalDist().inv_cdf(0.5 + level / 2), correct / images
    middle, half = share + z * z / (2 * images), z * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    return tuple(100 * (middle + sign * half) / (1 + z * z / images) for sign in (-1, 1))
