"""Another advantage's credit, in the groups whose teacher prefers right rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.advantage._composed import Component, Composed
from scsdpo.loss import Chunk, Credit, Signals, SumCredit
from scsdpo.types import Judged


@dataclass(frozen=True, kw_only=True)
class Trusted(Composed):
    """Credit only in groups whose teacher prefers right rollouts. c_i -> g_q c_i

        m_i    = mean_t (log T(y_t) - log S(y_t))                over the tokens of rollout i
        gain_q = mean of m_i over the group's right rollouts - mean of m_i over its wrong ones
        g_q    = 1 if gain_q > threshold, else 0

    T is the teacher's distribution after rollout i's own context. So a group is trusted if the
    context makes the teacher raise right rollouts more than wrong ones. Rollouts without a teacher
    are left out of the means. If no right one or no wrong one is left, the gain cannot be measured,
    and g_q is `unmeasured`. With `SiblingDemonstration` this holds for groups with one success,
    which is not shown to itself.

    g is detached. It multiplies credit and objective; tokens with g = 0 are run and stay in the
    denominators. Both log-probs are measured before the loss, in a second pass over the vocabulary.

    Args:
        advantage: gives the credit.
        threshold: least gain of a trusted group, in nats per token.
        unmeasured: g of a group whose gain cannot be measured, in [0, 1].

    Raises:
        ValueError: if `unmeasured` is outside its range.

    Source:
        Ours. docs/will-it-work.md measures that a teacher which knows no better does harm.
    """

    advantage: Advantage
    threshold: float = 0.0
    unmeasured: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.unmeasured <= 1:
            raise ValueError(f"`Trusted(unmeasured=...)` must be in [0, 1], got {self.unmeasured}")

    @property
    def inner(self) -> Sequence[Component]:
        return (Component(advantage=self.advantage),)

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_group(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"student_logprob", "teacher_logprob"}

    @property
    def objective_name(self) -> str:
        return self.advantage.objective_name

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        plan = self.advantage.planned(judged, available)
        taught = plan.active & available
        gate = _Gate(self.threshold, self.unmeasured, judged.successes, taught)

        def credit(chunk: Chunk) -> Credit:
            return SumCredit(parts=((chunk.derived(gate), plan.credit(chunk)),))

        return Plan(
            active=plan.active,
            needs_teacher=plan.needs_teacher | taught,
            needs_reference=plan.needs_reference,
            credit=credit,
            derivations=(*plan.derivations, gate),
        )


@dataclass(frozen=True, eq=False)
class _Gate:
    """Computes g at each token, [R, L], from a step's measured tables."""

    threshold: float
    unmeasured: float
    successes: Tensor
    taught: Tensor
    """[Q, G] bool: rollouts with a teacher."""

    def __call__(self, signals: Signals) -> Tensor:
        mask, shape = signals.mask, self.taught.shape
        difference = torch.where(mask, signals.teacher_logprob - signals.student_logprob, 0.0)
        mean = (difference.sum(-1) / mask.sum(-1).clamp(min=1)).view(shape)
        known = self.taught.to(mask.device) & mask.any(-1).view(shape)
        right = self.successes.to(mask.device)
        sides = [(known & side).double() for side in (right, ~right)]
        means = [(mean * side).sum(-1) / side.sum(-1).clamp(min=1) for side in sides]
        measured = torch.stack([side.any(-1) for side in sides]).all(0)
        trusted = (means[0] - means[1] > self.threshold).double()
        gate = torch.where(measured, trusted, self.unmeasured)
        return gate[:, None].expand(shape).reshape(-1, 1).expand(mask.shape)
