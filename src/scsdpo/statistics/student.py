"""Student's t: its distribution, its quantiles, and the power of its test."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_BISECTIONS = 80


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) with `df` >= 1 degrees of freedom.

    With t = sqrt(df) tan(a) it is 1/2 + c int_0^a cos(x)^(df - 1) dx,
    c = Gamma((df + 1) / 2) / (sqrt(pi) Gamma(df / 2)): the integrand is smooth and bounded.
    """
    if df < 1:
        raise ValueError(f"`t_cdf(df=...)` must be >= 1, got {df}")
    half = math.atan(t / math.sqrt(df)) / 2
    below = half * float(_WEIGHTS @ np.cos(half * (_NODES + 1)) ** (df - 1))
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * below


@cache
def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, 0 < p < 1."""
    if not 0 < p < 1:
        raise ValueError(f"`t_quantile(p=...)` must be in (0, 1), got {p}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    root = math.sqrt(df)
    angle = _root(lambda a: t_cdf(root * math.tan(a), df) - p, 0.0, math.pi / 2)
    return root * math.tan(angle)


def t_test_p(t: float, df: int) -> float:
    """Two-sided p-value: P(|T| >= |t|)."""
    return min(1.0, 2 * (1 - t_cdf(abs(t), df)))


@cache
def detectable(n: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest mean of `n` differences that is found, in standard deviations of one of them.

    Found: the interval of `level` around the mean leaves 0 out, in `power` of all such experiments.
    Solved exactly: given the sample deviation s (over the true one), whose square times n - 1 is
    chi-squared, the mean misses the bound t s with probability Phi(t s - shift).

    Args:
        n: pairs (seeds, or questions), >= 2.
        level: of the interval.
        power: share of experiments that find it.
    """
    if n < 2:
        raise ValueError(f"`detectable(n=...)` must be >= 2, got {n}")
    df, bound = n - 1, t_quantile((1 + level) / 2, n - 1)
    reach = 1 + 10 / math.sqrt(2 * df)
    s = reach * (_NODES + 1) / 2
    log_scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    density = np.exp(log_scale + (df - 1) * np.log(s) - df * s**2 / 2) * _WEIGHTS * reach / 2

    def lacking(shift: float) -> float:
        return float(density @ (_normal(shift - bound * s) + _normal(-shift - bound * s))) - power

    return _root(lacking, 0.0, 4 * bound + 20) / math.sqrt(n)


def _normal(z: np.ndarray) -> np.ndarray:
    return np.array([(1 + math.erf(x / math.sqrt(2))) / 2 for x in z.tolist()])


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
