"""Routers choose the rollouts of a route: by outcome, group, pass rate or time."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.state import Instant, PassRates, Stateful
from scsdpo.types import Judged


class Router(ABC):
    """Decides for each rollout whether the route takes it."""

    @abstractmethod
    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        """[Q, G] bool: rollouts that the route takes. Changes nothing.

        Args:
            judged: the responses and their verdicts.
            available: [Q, G] bool: the rollout has a teacher prompt.
        """


@dataclass(frozen=True)
class Every(Router):
    """Every rollout; for the last route, which takes all that no other route does."""

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return torch.ones_like(available)


@dataclass(frozen=True)
class Never(Router):
    """No rollout; it turns a route off."""

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return torch.zeros_like(available)


@dataclass(frozen=True)
class Failed(Router):
    """Rollouts below the success threshold."""

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return ~judged.successes


@dataclass(frozen=True)
class Succeeded(Router):
    """Rollouts that reach the success threshold."""

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return judged.successes


@dataclass(frozen=True)
class GroupFailed(Router):
    """Every rollout of a group without any success."""

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return (~judged.successes).all(-1, keepdim=True).expand_as(available)


@dataclass(frozen=True)
class HasTeacher(Router):
    """Rollouts that have a teacher prompt."""

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return available


@dataclass(frozen=True, kw_only=True)
class RateWithin(Router):
    """Questions whose pass rate is in [low, high], both included.

    Args:
        low: least pass rate, in [0, 1].
        high: largest pass rate, in [low, 1].
        rates: the pass rates: of this batch (`Instant`), or with earlier ones (`MovingAverage`,
            `DecayedBeta`).

    Raises:
        ValueError: if the band is not within [0, 1].
    """

    low: float
    high: float
    rates: PassRates = Instant()

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                "`RateWithin(low=..., high=...)` must have 0 <= low <= high <= 1, "
                f"got {self.low} and {self.high}"
            )

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        p = self.rates.rates(judged)
        return ((p >= self.low) & (p <= self.high))[:, None].expand_as(available)


class Warmup(Router, Stateful):
    """Every rollout during the first `steps` optimizer steps, then none.

    Args:
        steps: number of optimizer steps, >= 0.

    Raises:
        ValueError: if `steps` < 0.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"`Warmup(steps=...)` must be >= 0, got {steps}")
        self.steps = steps
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.taken: Tensor

    def after_step(self) -> None:
        self.taken += 1

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return torch.full_like(available, bool(self.taken < self.steps))


@dataclass(frozen=True, kw_only=True)
class AllOf(Router):
    """Rollouts that all of several routers claim.

    Args:
        routers: the routers; at least one.

    Raises:
        ValueError: if there are none.
    """

    routers: tuple[Router, ...]

    def __post_init__(self) -> None:
        if not self.routers:
            raise ValueError("`AllOf(routers=...)` must name at least one router, got none")

    def claims(self, judged: Judged, available: Tensor) -> Tensor:
        return torch.stack([r.claims(judged, available) for r in self.routers]).all(0)
