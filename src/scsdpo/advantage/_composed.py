"""Advantages that add up others, each with a weight and a weighting of its own."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan, rows_of
from scsdpo.loss import Chunk, Credit, Derivation, SparseCredit, SumCredit
from scsdpo.types import Judged
from scsdpo.weighting import Uniform, Weighting


@dataclass(frozen=True, kw_only=True)
class Component:
    """An advantage, and how much its credit counts."""

    advantage: Advantage
    weight: float = 1.0
    weighting: Weighting = Uniform()

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(
                f"`{type(self).__name__}(weight=...)` must be finite, got {self.weight}"
            )

    def coefficients(self, judged: Judged) -> Tensor:
        """[Q, G] float64: weight * W."""
        return self.weight * self.weighting.weights(judged)


class Composed(Advantage):
    """An advantage made of others. It needs all that they need."""

    @property
    @abstractmethod
    def inner(self) -> Sequence[Component]:
        """The components, in order."""

    @property
    def needs_teacher(self) -> bool:
        return any(part.advantage.needs_teacher for part in self.inner)

    @property
    def needs_reference(self) -> bool:
        return any(part.advantage.needs_reference for part in self.inner)

    @property
    def contexts(self) -> int:
        return max(part.advantage.contexts for part in self.inner)

    @property
    def needs_group(self) -> bool:
        return any(p.advantage.needs_group or p.weighting.needs_group for p in self.inner)

    @property
    def has_ratio(self) -> bool:
        return any(part.advantage.has_ratio for part in self.inner)

    @property
    def weightings(self) -> tuple[Weighting, ...]:
        return tuple(w for p in self.inner for w in (p.weighting, *p.advantage.weightings))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.advantage.needs for part in self.inner))

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return tuple(make for part in self.inner for make in part.advantage.derivations)


def combined(plans: Sequence[tuple[Tensor, Plan]], available: Tensor) -> Plan:
    """Add up several plans, each with weights [Q, G]. Where a plan's weight is 0 it is not used."""
    nobody = torch.zeros_like(available)

    def union(masks: list[Tensor]) -> Tensor:
        return torch.stack([nobody, *masks]).any(0)

    return Plan(
        active=union([plan.active & (w != 0) for w, plan in plans]),
        needs_teacher=union([plan.needs_teacher & (w != 0) for w, plan in plans]),
        needs_reference=union([plan.needs_reference & (w != 0) for w, plan in plans]),
        credit=partial(_sum_of_terms, tuple(_Term.of(w * plan.active, plan) for w, plan in plans)),
        derivations=tuple(make for _, plan in plans for make in plan.derivations),
    )


class _Term(NamedTuple):
    """A plan, its weights [R], and the rollouts in which its weight is not 0."""

    weights: Tensor
    plan: Plan
    rollouts: frozenset[int]

    @classmethod
    def of(cls, weights: Tensor, plan: Plan) -> "_Term":
        return cls(weights.flatten(), plan, rows_of(weights != 0))


def _sum_of_terms(terms: tuple[_Term, ...], chunk: Chunk) -> Credit:
    dtype = chunk.student.logits.dtype
    # A plan without weight in this chunk must not be called: its teacher may not have run.
    parts = tuple(
        (term.weights[chunk.rollout].to(dtype), term.plan.credit(chunk))
        for term in terms
        if not term.rollouts.isdisjoint(chunk.rollouts)
    )
    return SumCredit(parts=parts) if parts else SparseCredit.nothing(chunk)
