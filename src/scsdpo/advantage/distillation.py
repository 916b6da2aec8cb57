"""Credit from a divergence to a target distribution: the teacher's, or the reference's."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.advantage.support import Support, TopK
from scsdpo.advantage.target import AsTaught, Target
from scsdpo.loss import Chunk, Credit, TokenLogits
from scsdpo.types import Outcomes


@dataclass(frozen=True, kw_only=True)
class _Divergence(Advantage):
    """Shared by the two targets: what divergence, on what support."""

    alpha: float = 0.5
    support: Support = TopK()
    summand_clip: float = math.inf

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"`{name}(alpha=...)` must be in [0, 1] (0 forward KL, 1 reverse KL, between them "
                f"skewed JSD), got {self.alpha}"
            )
        if self.support.sampled and self.alpha != 1:
            raise ValueError(
                f"`{name}(support=Sampled)` estimates the reverse KL only: set alpha to 1, "
                f"got {self.alpha}"
            )
        if not self.summand_clip > 0:
            raise ValueError(
                f"`{name}(summand_clip=...)` must be > 0 (.inf: no clipping), "
                f"got {self.summand_clip}"
            )
        if self.support.sampled and self.summand_clip != math.inf:
            raise ValueError(
                f"`{name}(support=Sampled)` has no summands to clip: set summand_clip to .inf, "
                f"got {self.summand_clip}"
            )

    @property
    def objective_name(self) -> str:
        return "divergence"

    @abstractmethod
    def goal(self, chunk: Chunk) -> TokenLogits:
        """The distribution to move towards."""

    def _credit(self, chunk: Chunk) -> Credit:
        return self.support.credit(
            self.alpha, chunk.student, self.goal(chunk), chunk.ids, self.summand_clip
        )


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(_Divergence):
    """Distillation from the self-teacher. c(v) = S(v) (A(v) - sum_u S(u) A(u))

    with A = T/S (alpha = 0, forward KL), log T - log S (alpha = 1, reverse KL) or
    (1 - a) (log M - log S), M = (1 - a) S + a T (otherwise, skewed JSD); on a truncated support
    S and T are those of the support. S is the student after the question, T the teacher after
    question and privileged context, both on the student's own response.

    A rollout without a teacher prompt gets no credit and is not run. With a frozen teacher equal
    to the student and the same prompt, objective and gradient are 0.

    Args:
        alpha: in [0, 1]: 0 forward KL, 1 reverse KL, 0.5 the JSD of the paper.
        support: `Full()`, `TopK(k, tail)` or, with alpha = 1, `Sampled()`.
        summand_clip: largest summand of the divergence's sum over the vocabulary, in nats, > 0; a
            clipped one gives no credit. inf: none.
        target: what of the teacher is moved towards: `AsTaught()`, `LogitMix`, `DivergenceMix`.

    Shapes:
        logits [n, V] -> credit on [n, B]; objective [n] in nats, >= 0 (with `Sampled` only its
        mean is).

    Raises:
        ValueError: if `alpha` is outside [0, 1], or `Sampled` meets another alpha than 1.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802; SC-SDPO, arXiv:2605.27765; OPSD,
        arXiv:2601.18734, for the clip.
    """

    target: Target = AsTaught()

    @property
    def needs_teacher(self) -> bool:
        return True

    def goal(self, chunk: Chunk) -> TokenLogits:
        return self.target.of(chunk.student, chunk.teacher())

    def plan(self, outcomes: Outcomes, available: Tensor) -> Plan:
        return Plan(
            active=available,
            needs_teacher=available,
            needs_reference=torch.zeros_like(available),
            credit=self._credit,
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceAnchor(_Divergence):
    """Exact divergence to the reference policy, every rollout. alpha = 1: KL(S || R)

    The KL term of PPO and GRPO without an estimator's noise: blend it with a coefficient, e.g.
    `Blend` of `GroupRelative` (1.0) and `ReferenceAnchor` (0.001). The gradient is that of the
    per-token divergence at the sampled prefixes.

    Args:
        alpha: as in `SelfDistillation`; 1 is the usual KL(S || R).
        support: as in `SelfDistillation`.
        summand_clip: as in `SelfDistillation`.

    Raises:
        ValueError: as `SelfDistillation`.
    """

    alpha: float = 1.0

    @property
    def needs_reference(self) -> bool:
        return True

    def goal(self, chunk: Chunk) -> TokenLogits:
        return chunk.reference()

    def plan(self, outcomes: Outcomes, available: Tensor) -> Plan:
        return Plan(
            active=torch.ones_like(available),
            needs_teacher=torch.zeros_like(available),
            needs_reference=torch.ones_like(available),
            credit=self._credit,
        )
