"""Different advantages for different rollouts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo import contracts
from scsdpo.advantage._base import Advantage, Plan
from scsdpo.advantage.blend import combined
from scsdpo.advantage.rate_weight import RateWeight
from scsdpo.advantage.router import Every, Router
from scsdpo.loss import Derivation
from scsdpo.types import Outcomes


@dataclass(frozen=True, kw_only=True)
class Route:
    """One route of a `Routed`.

    Args:
        advantage: what gives the credit.
        where: the rollouts that take this route, of those that no earlier route claimed.
        weight: coefficient of the credit; finite, or a function of the question's pass rate.
    """

    advantage: Advantage
    where: Router = Every()
    weight: float | RateWeight = 1.0

    def weights(self, outcomes: Outcomes) -> Tensor:
        """[Q, 1] float64: the coefficient at each question."""
        if not isinstance(self.weight, RateWeight):
            return torch.full_like(outcomes.rewards[:, :1], self.weight, dtype=torch.float64)
        weights = contracts.numbers(
            self.weight.of(outcomes),
            of=f"{type(self.weight).__name__}.of",
            axes="[Q]",
            shape=tuple(outcomes.rewards.shape[:1]),
        )
        return weights.double()[:, None]


@dataclass(frozen=True, kw_only=True)
class Routed(Advantage):
    """Each rollout takes the first route that claims it. c = weight_route c_route

    A rollout that no route claims gets no credit and is not run. Every advantage is planned on the
    whole batch and its credit used on its own rollouts: a `GroupRelative` compares with the whole
    group, siblings on other routes included.

    A constant weight, or one that follows the pass rate: GRPO's credit times 1 - p on successes is
    `Route(where=Succeeded(), advantage=GroupRelative(), weight=RatePower(failed=1))`.

    SRPO is (`Failed` and `HasTeacher` -> `SelfDistillation`, else `GroupRelative`).

    Args:
        routes: at least one, in the order in which they are asked.

    Raises:
        ValueError: if there are no routes, or a weight is not finite.

    Source:
        SRPO, arXiv:2604.02288; DRIFT, arXiv:2606.30345.
    """

    routes: tuple[Route, ...]

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("`Routed(routes=...)` must name at least one route, got none")
        for route in self.routes:
            if not isinstance(route.weight, RateWeight) and not math.isfinite(route.weight):
                raise ValueError(f"`Route(weight=...)` must be finite, got {route.weight}")

    @property
    def needs_teacher(self) -> bool:
        return any(route.advantage.needs_teacher for route in self.routes)

    @property
    def needs_reference(self) -> bool:
        return any(route.advantage.needs_reference for route in self.routes)

    @property
    def needs_group(self) -> bool:
        return all(route.advantage.needs_group for route in self.routes)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(route.advantage.needs for route in self.routes))

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return tuple(make for route in self.routes for make in route.advantage.derivations)

    def plan(self, outcomes: Outcomes, available: Tensor) -> Plan:
        free = torch.ones_like(available)
        plans = []
        for route in self.routes:
            claimed = contracts.mask(
                route.where.claims(outcomes, available),
                of=f"{type(route.where).__name__}.claims",
                axes="[Q, G]",
                shape=tuple(available.shape),
            )
            mine = free & claimed
            free = free & ~mine
            plan = route.advantage.planned(outcomes, available)
            plans.append((route.weights(outcomes) * mine.double(), plan))
        return combined(plans, available)
