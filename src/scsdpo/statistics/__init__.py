"""Statistics of evaluations and comparisons, with numpy alone.

The unit is the question (its score over k responses), or the seed (a whole run). Tests simulate the
coverage of the intervals, and docs/evaluation.md states it.
"""

from scsdpo.statistics.distributions import detectable, t_cdf, t_quantile, t_test_p
from scsdpo.statistics.intervals import (
    Estimate,
    detectable_difference,
    difference_bounds,
    interval,
    mean_interval,
    paired_interval,
    score_bounds,
    score_difference,
    score_interval,
)
from scsdpo.statistics.scores import majority, pass_at_k, pass_ks

__all__ = [
    "Estimate",
    "detectable",
    "detectable_difference",
    "difference_bounds",
    "interval",
    "majority",
    "mean_interval",
    "paired_interval",
    "pass_at_k",
    "pass_ks",
    "score_bounds",
    "score_difference",
    "score_interval",
    "t_cdf",
    "t_quantile",
    "t_test_p",
]
