"""Means over questions or seeds, with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from scsdpo.statistics.distributions import beta_quantile, detectable, t_quantile

Numbers = Sequence[float] | np.ndarray
_END = 0.125
"""Share of a question that is added at each end of the range in the variance of scores; chosen by
the coverage of the intervals."""
_MOST = 1e6
"""Largest effective number of yes-or-no questions."""
_ALIKE = 0.05
"""If both scores of a pair are within this distance of one end, the pair shows no difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its interval; nan where there are too few values."""

    value: float
    low: float
    high: float
    n: int
    """Number of questions, or seeds."""

    @property
    def tells(self) -> bool:
        """True if 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def interval(values: Numbers, *, level: float = 0.95) -> Estimate:
    """`score_interval` if all values lie in [0, 1], else `mean_interval`."""
    sample = np.asarray(values, dtype=np.float64)
    return (score_interval if _are_scores(sample) else mean_interval)(sample, level=level)


def paired_interval(first: Numbers, second: Numbers, *, level: float = 0.95) -> Estimate:
    """Interval of the mean of second - first.

    `score_difference` if all values lie in [0, 1], else `mean_interval` of the differences.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if _are_scores(a) and _are_scores(b):
        return score_difference(a, b, level=level)
    return mean_interval(b - a, level=level)


def _are_scores(sample: np.ndarray) -> bool:
    return bool(((sample >= 0) & (sample <= 1)).all())


def mean_interval(values: Numbers, *, level: float = 0.95) -> Estimate:
    """Student's interval of a mean: m +- t(n - 1) s / sqrt(n), s the sample's deviation.

    It is for values that are not bounded, such as lengths or differences between seeds. Its
    coverage is exactly `level` if the values are normal, for any n. If all values are equal, their
    spread is unknown and the bounds are nan.

    Args:
        values: [n], independent; a question's mean over its k responses, a seed's difference, ...
        level: level of the interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    spread = float(sample.std(ddof=1)) if n > 1 else 0.0
    if not spread > 1e-12 * np.abs(sample).max(initial=0.0):  # a smaller spread is rounding
        return Estimate(value=mean, low=math.nan, high=math.nan, n=n)
    half = t_quantile((1 + level) / 2, n - 1) * spread / math.sqrt(n)
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n)


def score_interval(scores: Numbers, *, level: float = 0.95) -> Estimate:
    """Interval of the mean of scores in [0, 1]: Clopper and Pearson's, for an effective number of
    yes-or-no questions.

    Let m and v be the mean and the variance of the scores together with an eighth of a question at
    either end. The effective number is e = n m (1 - m) / v >= n. Since v is estimated, only
    (z / t(n - 1))^2 of the excess e - n counts. The bounds are Clopper and Pearson's beta
    quantiles for e questions, of which a share equal to the mean is right. For scores of 0 and 1
    alone e = n, and the interval is the exact one, which covers at least `level`. Otherwise it
    tends to Student's. It stays within [0, 1], and has a width even if all scores are equal.
    docs/evaluation.md states its coverage.

    Args:
        scores: [n] in [0, 1], one per question: mean@k, maj@k, pass@k, a share of its responses.
        level: level of the interval.

    Raises:
        ValueError: if a score lies outside [0, 1].

    Source:
        Clopper and Pearson 1934; the effective number as Korn and Graubard 1998, for surveys.
    """
    sample = np.asarray(scores, dtype=np.float64)
    if not _are_scores(sample):
        raise ValueError("`score_interval(scores=...)` must lie in [0, 1]; use `mean_interval`")
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Estimate(value=mean, low=math.nan, high=math.nan, n=n)
    ((low,), (high,)) = score_bounds(sample[None], level=level)
    return Estimate(value=mean, low=float(low), high=float(high), n=n)


def score_bounds(scores: np.ndarray, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of `score_interval`, [S] and [S], for S samples of n >= 2 scores each, [S, n]."""
    n, mean = scores.shape[1], scores.mean(1)
    weight, upper = n + 2 * _END, (1 + level) / 2
    center = (scores.sum(1) + _END) / weight
    variance = ((scores**2).sum(1) + _END) / weight - center**2
    known = n * center * (1 - center) / variance
    shrunk = (NormalDist().inv_cdf(upper) / t_quantile(upper, n - 1)) ** 2
    effective = np.clip(n + (known - n) * shrunk, n, max(_MOST, n))
    of = effective * np.stack(
        [mean, 1 - mean]
    )  # right ones (lower bound), wrong ones (upper bound)
    some = of > 1e-9 * effective
    quantiles = beta_quantile(1 - upper, np.where(some, of, 1.0), of[::-1] + 1)
    low, rest = np.where(some, quantiles, 0.0)
    return np.minimum(low, mean), np.maximum(1 - rest, mean)


def score_difference(first: Numbers, second: Numbers, *, level: float = 0.95) -> Estimate:
    """Interval of the mean of second - first, two scores in [0, 1] of the same questions.

    It is Student's, with one more question in the sum of squares for differences that the sample
    did not have:

        v = (sum_i (d_i - mean d)^2 + j) / (n - 1)
        half = max(t(n - 1) sqrt(v / n), r (1 - ((1 - level) / 2)^(1/n)))

    r^2 is the mean square of the differences that are not 0 (1 if all are 0), and
    j = max(r^2, f^2 / 2), where f is the share of pairs whose scores both lie within .05 of the
    same end: questions that are mastered or hopeless for both cannot show a difference. The second
    term of the maximum is the mean that n questions without a difference of size r cannot exclude.
    For scores of 0 and 1, j = 1: half a question won and half a question lost.

    Args:
        first: [n] in [0, 1], one per question.
        second: [n] in [0, 1], of the same questions in the same order.
        level: level of the interval.

    Raises:
        ValueError: if a score lies outside [0, 1].

    Source:
        For yes-or-no answers: half a pair in each discordant cell, Agresti and Min 2005.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (first, second))
    if not (_are_scores(a) and _are_scores(b)):
        raise ValueError("`score_difference(...)` needs scores in [0, 1]; use `mean_interval`")
    n = len(a)
    mean = float((b - a).mean()) if n else math.nan
    if n < 2:
        return Estimate(value=mean, low=math.nan, high=math.nan, n=n)
    ((low,), (high,)) = difference_bounds(a[None], b[None], level=level)
    return Estimate(value=mean, low=float(low), high=float(high), n=n)


def difference_bounds(
    first: np.ndarray, second: np.ndarray, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of `score_difference`, [S] and [S], for S samples of n >= 2 pairs each, [S, n]."""
    gaps, n = second - first, first.shape[1]
    mean, met = gaps.mean(1), (np.abs(gaps) > 1e-12).sum(1)
    square = np.where(met > 0, (gaps**2).sum(1) / np.maximum(met, 1), 1.0)
    least, most = np.minimum(first, second), np.maximum(first, second)
    alike = ((least >= 1 - _ALIKE) | (most <= _ALIKE)).mean(1)
    more = np.maximum(square, alike**2 / 2)
    variance = (((gaps - mean[:, None]) ** 2).sum(1) + more) / (n - 1)
    upper = (1 + level) / 2
    half = t_quantile(upper, n - 1) * np.sqrt(variance / n)
    half = np.maximum(half, np.sqrt(square) * (1 - (1 - upper) ** (1 / n)))
    return np.maximum(mean - half, -1.0), np.minimum(mean + half, 1.0)


def detectable_difference(estimate: Estimate, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true mean that an experiment like this one finds with probability `power`.

    It is `detectable` times the standard deviation of one difference, which follows from the
    interval as half sqrt(n) / t(n - 1); nan where there is no interval. It says what an experiment
    could have found, and how many pairs the next one needs.

    Args:
        estimate: the mean of the differences.
        level: level of its interval.
        power: share of experiments that find the mean.
    """
    n = estimate.n
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    if not half >= 0:
        return math.nan
    deviation = half * math.sqrt(n) / t_quantile((1 + level) / 2, n - 1)
    return deviation * detectable(n, level=level, power=power)
