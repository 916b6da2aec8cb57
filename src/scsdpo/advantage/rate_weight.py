"""Coefficients of a route that change with the question's pass rate."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from scsdpo.state import Instant, PassRates
from scsdpo.types import Outcomes


class RateWeight(ABC):
    """A route's coefficient as a function of the question's pass rate."""

    @abstractmethod
    def of(self, outcomes: Outcomes) -> Tensor:
        """[Q] float64, finite; once a batch."""


@dataclass(frozen=True, kw_only=True)
class RatePower(RateWeight):
    """w_j = scale p_j^solved (1 - p_j)^failed

    With both exponents 0 it is the constant `scale`. `solved` takes a route away from questions
    that are out of reach, `failed` from those that are mastered. 0^0 is 1.

    Args:
        solved: exponent of the pass rate, >= 0.
        failed: exponent of the share of failures, >= 0.
        scale: coefficient; finite.
        rates: of this batch (`Instant`), or with a memory (`MovingAverage`, `DecayedBeta`).

    Shapes:
        successes [Q, G] -> w [Q] float64.

    Raises:
        ValueError: if an exponent is < 0, or a number is not finite.
    """

    solved: float = 0.0
    failed: float = 0.0
    scale: float = 1.0
    rates: PassRates = Instant()

    def __post_init__(self) -> None:
        for name, exponent in (("solved", self.solved), ("failed", self.failed)):
            if not 0 <= exponent < math.inf:
                raise ValueError(f"`RatePower({name}=...)` must be >= 0 and finite, got {exponent}")
        if not math.isfinite(self.scale):
            raise ValueError(f"`RatePower(scale=...)` must be finite, got {self.scale}")

    def of(self, outcomes: Outcomes) -> Tensor:
        p = self.rates.observe(outcomes)
        return self.scale * p**self.solved * (1 - p) ** self.failed
