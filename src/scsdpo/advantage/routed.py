"""Different advantages for different rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo import contracts
from scsdpo.advantage._base import Plan
from scsdpo.advantage._composed import Component, Composed, combined
from scsdpo.advantage.router import Every, Router
from scsdpo.types import Judged


@dataclass(frozen=True, kw_only=True)
class Route(Component):
    """One route of a `Routed`. Its credit counts weight * W_i for rollout i

    Args:
        advantage: gives the credit.
        weight: coefficient of the credit; finite.
        weighting: W [Q, G], how much each question and rollout counts on this route alone, e.g. by
            the question's pass rate: `RatePower(failed=1)`, `PassRate()`. It is computed from the
            whole batch, questions that do not take the route included.
        where: chooses the rollouts of this route, among those that no earlier route claimed.

    Raises:
        ValueError: if `weight` is not finite.
    """

    where: Router = Every()


@dataclass(frozen=True, kw_only=True)
class Routed(Composed):
    """Each rollout takes the first route that claims it. c_i = weight W_i c_i of that route

    A rollout that no route claims, or whose W is 0, gets no credit and is not run. Each advantage
    plans on the whole batch, and its credit is used on its own rollouts: `GroupRelative` compares
    with the whole group, siblings on other routes included.

    SRPO is (`Failed` and `HasTeacher` -> `SelfDistillation`, else `GroupRelative`). GRPO's credit
    times 1 - p on successes is
    `Route(where=Succeeded(), advantage=GroupRelative(), weighting=RatePower(failed=1))`.

    Args:
        routes: at least one; earlier routes claim first.

    Raises:
        ValueError: if there are no routes.

    Source:
        SRPO, arXiv:2604.02288; DRIFT, arXiv:2606.30345.
    """

    routes: tuple[Route, ...]

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("`Routed(routes=...)` must name at least one route, got none")

    @property
    def inner(self) -> Sequence[Component]:
        return self.routes

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        free = torch.ones_like(available)
        plans = []
        for route in self.routes:
            claimed = contracts.mask(
                route.where.claims(judged, available),
                of=f"{type(route.where).__name__}.claims",
                axes="[Q, G]",
                shape=tuple(available.shape),
            )
            mine = free & claimed
            free = free & ~mine
            plan = route.advantage.planned(judged, available)
            plans.append((route.coefficients(judged) * mine, plan))
        return combined(plans, available)
