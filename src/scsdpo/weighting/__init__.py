"""Weighting: how much does each question, rollout and token count?"""

from scsdpo.weighting._base import Weighting
from scsdpo.weighting.frozen import FrozenPassRate
from scsdpo.weighting.pass_rate import HardFilter, PassRate, Product, RatePower, Uniform
from scsdpo.weighting.tokens import (
    ContrastPaths,
    Horizon,
    Overlong,
    Position,
    TeacherEntropy,
    TokenWeighting,
    UniformTokens,
)

__all__ = [
    "ContrastPaths",
    "FrozenPassRate",
    "HardFilter",
    "Horizon",
    "Overlong",
    "PassRate",
    "Position",
    "Product",
    "RatePower",
    "TeacherEntropy",
    "TokenWeighting",
    "Uniform",
    "UniformTokens",
    "Weighting",
]
