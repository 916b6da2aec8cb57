"""Sums of advantages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.loss import Chunk, Credit, Derivation, SparseCredit, SumCredit
from scsdpo.types import Outcomes


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """One term of a `Blend`.

    Args:
        advantage: what gives the credit.
        weight: its coefficient; finite.
    """

    advantage: Advantage
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Blend(Advantage):
    """Weighted sum of credits. c = sum_i weight_i c_i

    A rollout is run if any part wants it; each part speaks only where its own plan is active.
    SDPO's hybrid with GRPO is weights (l, 1 - l), l = .9; a KL anchor is a `ReferenceAnchor` with
    a small weight.

    Args:
        parts: at least one.

    Raises:
        ValueError: if there are no parts, or a weight is not finite.

    Source:
        arXiv:2601.20802, A = l A_GRPO + (1 - l) A_SDPO.
    """

    parts: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("`Blend(parts=...)` must name at least one advantage, got none")
        for part in self.parts:
            if not math.isfinite(part.weight):
                raise ValueError(f"`Weighted(weight=...)` must be finite, got {part.weight}")

    @property
    def needs_teacher(self) -> bool:
        return any(part.advantage.needs_teacher for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        return any(part.advantage.needs_reference for part in self.parts)

    @property
    def needs_group(self) -> bool:
        return all(part.advantage.needs_group for part in self.parts)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.advantage.needs for part in self.parts))

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return tuple(make for part in self.parts for make in part.advantage.derivations)

    def plan(self, outcomes: Outcomes, available: Tensor) -> Plan:
        parts = [part for part in self.parts if part.weight != 0]
        whole = torch.ones_like(available, dtype=torch.float64)
        plans = [(p.weight * whole, p.advantage.planned(outcomes, available)) for p in parts]
        return combined(plans, available)


def combined(plans: Sequence[tuple[Tensor, Plan]], available: Tensor) -> Plan:
    """One plan of several, each with weights [Q, G]; a plan is not asked where its weight is 0."""
    nobody = torch.zeros_like(available)

    def union(masks: list[Tensor]) -> Tensor:
        return torch.stack([nobody, *masks]).any(0)

    return Plan(
        active=union([plan.active & (w != 0) for w, plan in plans]),
        needs_teacher=union([plan.needs_teacher & (w != 0) for w, plan in plans]),
        needs_reference=union([plan.needs_reference & (w != 0) for w, plan in plans]),
        credit=partial(_sum, tuple(((w * plan.active).flatten(), plan) for w, plan in plans)),
        derivations=tuple(make for _, plan in plans for make in plan.derivations),
    )


def _sum(terms: tuple[tuple[Tensor, Plan], ...], chunk: Chunk) -> Credit:
    dtype = chunk.student.logits.dtype
    here = [(weights[chunk.rollout].to(dtype), plan) for weights, plan in terms]
    # A part without a say in this chunk is not asked: its teacher may not have run.
    said = tuple((w, plan.credit(chunk)) for w, plan in here if (w != 0).any())
    return SumCredit(parts=said) if said else SparseCredit.nothing(chunk)
