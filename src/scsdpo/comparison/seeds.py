"""Compare two methods over the same seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scsdpo.statistics import Estimate, detectable_difference, mean_interval


@dataclass(frozen=True, kw_only=True)
class SeedRow:
    """One figure of two methods, paired by seed."""

    name: str
    a: float
    """Mean of a over the seeds that both have."""
    b: float
    difference: Estimate
    """b - a, with Student's interval over seeds, t(n - 1); none if all differences are equal."""
    joint: Estimate
    """`difference` with the interval corrected for the number of comparisons (Bonferroni)."""
    ahead: int
    """Number of seeds in which b is higher."""
    detectable: float
    """The smallest true difference that this many seeds detect in 4 of 5 experiments."""


def by_seed(
    a: Mapping[int, Mapping[str, float]],
    b: Mapping[int, Mapping[str, float]],
    names: Sequence[str],
    *,
    comparisons: int = 1,
    level: float = 0.95,
) -> list[SeedRow]:
    """Compare b with a on the seeds that both have.

    Args:
        a: figures of the baseline by seed, then by name.
        b: figures of the other method.
        names: figures to compare.
        comparisons: number of intervals that are read together.
        level: level of the intervals.
    """
    seeds = sorted(a.keys() & b.keys())
    rows = []
    for name in names:
        left, right = ([method[seed][name] for seed in seeds] for method in (a, b))
        gaps = [y - x for x, y in zip(left, right, strict=True)]
        difference = mean_interval(gaps, level=level)
        rows.append(
            SeedRow(
                name=name,
                a=mean_interval(left).value,
                b=mean_interval(right).value,
                difference=difference,
                joint=mean_interval(gaps, level=1 - (1 - level) / max(comparisons, 1)),
                ahead=sum(gap > 0 for gap in gaps),
                detectable=detectable_difference(difference, level=level),
            )
        )
    return rows
