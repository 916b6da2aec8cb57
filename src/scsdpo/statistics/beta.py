"""The beta distribution's quantiles, for arrays."""

import math
from statistics import NormalDist

import numpy as np

_TINY = 1e-300
_TERMS = 5_000
_STEPS = 100


def beta_quantile(p: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x with I_x(a, b) = p, entry by entry, to 1e-12; Newton's steps, or the bracket's middle.

    Args:
        p: in (0, 1).
        a: > 0.
        b: > 0, of a's shape.
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
    turned = x > (a + 1) / (a + b + 2)  # there the other end's fraction converges faster
    a, b, x = np.where(turned, b, a), np.where(turned, a, b), np.where(turned, 1 - x, x)
    c, d = np.ones_like(x), 1 / _away(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = np.ones_like(x)
        for term in (even, odd):
            d, c = 1 / _away(1 + term * d), _away(1 + term / c)
            change = change * d * c
        value = value * change
        if np.abs(change - 1).max(initial=0.0) < 1e-13:
            break
    below = power * value / a
    return np.where(turned, 1 - below, below)


def _away(value: np.ndarray) -> np.ndarray:
    """From 0, by which is divided."""
    return np.where(np.abs(value) < _TINY, _TINY, value)
