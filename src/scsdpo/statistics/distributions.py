"""Quantiles of the beta distribution and of Student's t, and the power of the t-test."""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import numpy as np

_TINY = 1e-300
_TERMS = 5_000
_STEPS = 100
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_BISECTIONS = 80


def beta_quantile(p: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x with I_x(a, b) = p, entry by entry, to 1e-12, by Newton steps and bisection.

    Args:
        p: probability, in (0, 1).
        a: first parameter, > 0.
        b: second parameter, > 0, of a's shape.
    """
    log_scale = np.array(
        [
            math.lgamma(s + t) - math.lgamma(s) - math.lgamma(t)
            for s, t in zip(a.flat, b.flat, strict=True)
        ]
    ).reshape(a.shape)
    low, high, mean = np.zeros(a.shape), np.ones(a.shape), a / (a + b)
    x = mean + NormalDist().inv_cdf(p) * np.sqrt(mean * (1 - mean) / (a + b + 1))
    x = np.clip(x, mean / 20, 1 - (1 - mean) / 20)
    for _ in range(_STEPS):
        log_power = a * np.log(x) + b * np.log1p(-x) + log_scale
        error = _regularized(x, a, b, np.exp(log_power)) - p
        low, high = np.where(error < 0, x, low), np.where(error > 0, x, high)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            moved = x - error * np.exp(np.log(x) + np.log1p(-x) - log_power)
        inside = (moved > low) & (moved < high)
        moved = np.where(error == 0, x, np.where(inside, moved, (low + high) / 2))
        done = np.abs(moved - x) <= 1e-12 + 1e-10 * x
        x = np.clip(moved, _TINY, 1 - 1e-16)
        if done.all():
            break
    return x


def _regularized(x: np.ndarray, a: np.ndarray, b: np.ndarray, power: np.ndarray) -> np.ndarray:
    """I_x(a, b), given `power` = x^a (1 - x)^b / B(a, b); the continued fraction by Lentz's method.

    Source:
        Numerical Recipes, section 6.4.
    """
    turned = x > (a + 1) / (a + b + 2)  # where the fraction of the other end converges faster
    a, b, x = np.where(turned, b, a), np.where(turned, a, b), np.where(turned, 1 - x, x)
    c, d = np.ones_like(x), 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = np.ones_like(x)
        for term in (even, odd):
            d, c = 1 / _nonzero(1 + term * d), _nonzero(1 + term / c)
            change = change * d * c
        value = value * change
        if np.abs(change - 1).max(initial=0.0) < 1e-13:
            break
    below = power * value / a
    return np.where(turned, 1 - below, below)


def _nonzero(value: np.ndarray) -> np.ndarray:
    """`value`, with a tiny number in the place of 0, so that it can be divided by."""
    return np.where(np.abs(value) < _TINY, _TINY, value)


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

    It is found if the interval of `level` around the mean does not contain 0, which must happen in
    `power` of all such experiments. The solution is exact: given the sample deviation s (over the
    true one), whose square times n - 1 is chi-squared, the mean misses the bound t s with
    probability Phi(t s - shift).

    Args:
        n: number of pairs (seeds, or questions), >= 2.
        level: level of the interval.
        power: share of experiments that find the mean.
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
