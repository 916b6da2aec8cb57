"""Means over questions or over seeds, and what they are known to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scsdpo.statistics.student import detectable, t_quantile

Numbers = Sequence[float] | np.ndarray
_END = 0.25
"""Of a question at each end of the range, in the variance of scores; chosen by what it covers."""
_DISCORDANT = 0.5
"""Of a question won and one lost, in the variance of differences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its interval; nan where too little is known."""

    value: float
    low: float
    high: float
    n: int
    """Questions, or seeds, that it is the mean of."""

    @property
    def tells(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Numbers, *, level: float = 0.95) -> Estimate:
    """Student's interval of a mean: m +- t(n - 1) s / sqrt(n), s the sample's deviation.

    For values without ends, or far from them: lengths, differences of means, seeds. Covers
    `level` exactly if the values are normal, whatever their number.

    Args:
        values: [n], independent; a question's mean over its k responses, a seed's difference, ...
        level: of the interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Estimate(value=mean, low=math.nan, high=math.nan, n=n)
    half = t_quantile((1 + level) / 2, n - 1) * float(sample.std(ddof=1)) / math.sqrt(n)
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n)


def score_interval(scores: Numbers, *, level: float = 0.95) -> Estimate:
    """Interval of the mean of scores in [0, 1]: Wilson's, with the effective number of questions.

    The bounds are the m with |mean - m| = t(n - 1) sqrt(m (1 - m) / e), where
    e = n m' (1 - m') / v' is the number of yes-or-no questions that would tell as much; m' and v'
    are mean and variance of the scores and a quarter of a question at either end. For scores of 0
    and 1 alone that is Wilson's interval, for others it tends to Student's. It stays within
    [0, 1], and has a width where all questions scored alike; both Student's interval and the
    bootstrap cover next to nothing there. docs/evaluation.md has what each covers.

    Args:
        scores: [n] in [0, 1], one a question: mean@k, maj@k, pass@k, a share of its responses.
        level: of the interval.

    Source:
        Wilson 1927; the effective number as for complex surveys (Korn and Graubard 1998).
    """
    sample = np.asarray(scores, dtype=np.float64)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Estimate(value=mean, low=math.nan, high=math.nan, n=n)
    if sample.min() < 0 or sample.max() > 1:
        raise ValueError("`score_interval(scores=...)` must lie in [0, 1]; use `mean_interval`")
    weight = n + 2 * _END
    center = (float(sample.sum()) + _END) / weight
    variance = (float((sample**2).sum()) + _END) / weight - center**2
    effective = n * center * (1 - center) / variance
    z2 = t_quantile((1 + level) / 2, n - 1) ** 2 / effective
    middle = (mean + z2 / 2) / (1 + z2)
    half = math.sqrt(max(mean * (1 - mean), 0.0) * z2 + z2**2 / 4) / (1 + z2)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return Estimate(value=mean, low=min(low, mean), high=max(high, mean), n=n)


def score_difference(differences: Numbers, *, level: float = 0.95) -> Estimate:
    """Interval of the mean difference of two scores in [0, 1], paired by question.

    Student's, with half a question at -1 and half a one at 1 in the variance: where all questions
    but few scored alike, what was not met is left open.

    Args:
        differences: [n] in [-1, 1], one a question: of maj@k, or of pass@k.
        level: of the interval.

    Source:
        Of yes-or-no answers: half a pair in each discordant cell, Agresti and Min 2005.
    """
    sample = np.asarray(differences, dtype=np.float64)
    n = len(sample)
    mean = float(sample.mean()) if n else math.nan
    if n < 2:
        return Estimate(value=mean, low=math.nan, high=math.nan, n=n)
    variance = (float(((sample - mean) ** 2).sum()) + 2 * _DISCORDANT) / (n - 1)
    half = t_quantile((1 + level) / 2, n - 1) * math.sqrt(variance / n)
    return Estimate(value=mean, low=max(mean - half, -1.0), high=min(mean + half, 1.0), n=n)


def detectable_difference(
    differences: Numbers, *, level: float = 0.95, power: float = 0.8
) -> float:
    """The smallest true mean that so many such differences would tell from 0, mostly.

    `detectable` times the sample's deviation; nan with fewer than two. It says what an experiment
    could have found, and how many pairs the next one needs.
    """
    sample = np.asarray(differences, dtype=np.float64)
    if len(sample) < 2:
        return math.nan
    return float(sample.std(ddof=1)) * detectable(len(sample), level=level, power=power)
