"""Weighted sums of advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from scsdpo.advantage._base import Plan
from scsdpo.advantage._composed import Component, Composed, combined
from scsdpo.types import Judged


@dataclass(frozen=True, kw_only=True)
class Weighted(Component):
    """One term of a `Blend`. Its credit counts weight * W_i for rollout i

    Args:
        advantage: gives the credit.
        weight: coefficient of the credit; finite.
        weighting: W [Q, G], how much each question and rollout counts in this term alone;
            `model.weighting` multiplies all terms.

    Raises:
        ValueError: if `weight` is not finite.
    """


@dataclass(frozen=True, kw_only=True)
class Blend(Composed):
    """Weighted sum of credits. c_i = sum_k weight_k W_ki c_ki at rollout i

    A rollout is run if any part gives it credit. A part gives credit only where its own plan is
    active and its W is not 0. SDPO's hybrid with GRPO has weights (l, 1 - l), l = .9. With
    `weighting: PassRate` on the second part alone it is SC-SDPO's hybrid. A KL anchor is a
    `ReferenceAnchor` with a small weight.

    Args:
        parts: the terms; at least one.

    Raises:
        ValueError: if there are no parts.

    Source:
        arXiv:2601.20802, A = l A_GRPO + (1 - l) A_SDPO.
    """

    parts: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("`Blend(parts=...)` must name at least one advantage, got none")

    @property
    def inner(self) -> Sequence[Component]:
        return self.parts

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        parts = [part for part in self.parts if part.weight != 0]
        plans = [(p.coefficients(judged), p.advantage.planned(judged, available)) for p in parts]
        return combined(plans, available)
