"""Credit from a divergence to the teacher's or the reference's distribution."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.advantage.divergence import Divergence, FDivergence
from scsdpo.advantage.support import Support, TopK
from scsdpo.advantage.target import AsTaught, Target
from scsdpo.loss import Chunk, Credit, Derivation, TokenLogits
from scsdpo.types import Judged


@dataclass(frozen=True, kw_only=True)
class _Distillation(Advantage):
    """Distillation to `goal`: a divergence on a support."""

    divergence: FDivergence = Divergence()
    support: Support = TopK()

    def __post_init__(self) -> None:
        if self.support.sampled and self.divergence != Divergence(alpha=1.0):
            raise ValueError(
                f"`{type(self).__name__}(support=Sampled)` estimates the reverse KL only, and has "
                "no summands to clip: set divergence.alpha to 1 and divergence.summand_clip to "
                f".inf, got {self.divergence}"
            )

    @property
    def objective_name(self) -> str:
        return "divergence"

    @abstractmethod
    def goal(self, chunk: Chunk) -> TokenLogits:
        """The distribution to move towards."""

    def _credit(self, chunk: Chunk) -> Credit:
        return self.support.credit(self.divergence, chunk.student, self.goal(chunk), chunk.ids)


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(_Distillation):
    """Distillation from the self-teacher. c(v) = S(v) (A(v) - sum_u S(u) A(u))

    A = T/S for the forward KL (alpha = 0), log T - log S for the reverse KL (alpha = 1), and
    (1 - a) (log M - log S), M = (1 - a) S + a T, for the skewed JSD (otherwise); other divergences
    have their own. On a truncated support S and T are distributions over the support. S is the
    student after the question, T the teacher after question and privileged context, both on the
    student's own response.

    A rollout without a teacher prompt gets no credit and is not run. With a frozen teacher equal
    to the student and the same prompt, objective and gradient are 0.

    Args:
        divergence: `Divergence(alpha)`, 0.5 is the JSD of the paper, or `SquaredHellinger()`.
        support: `Full()`, `TopK(k, tail)` or, with alpha = 1 and no clip, `Sampled()`.
        target: the distribution that the student is moved towards: `AsTaught()`, `LogitMix`,
            `DivergenceMix`, `PriorAtForks`, `Purified`.

    Shapes:
        logits [n, V] -> credit on [n, B]; objective [n] in nats, >= 0 (with `Sampled` only its
        mean is).

    Raises:
        ValueError: if the support is `Sampled` and the divergence is not the reverse KL.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802; SC-SDPO, arXiv:2605.27765; OPSD,
        arXiv:2601.18734, for the clip.
    """

    target: Target = AsTaught()

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.target.needs_reference

    @property
    def contexts(self) -> int:
        return self.target.contexts

    @property
    def needs(self) -> frozenset[str]:
        return self.target.needs

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return self.target.derivations

    def goal(self, chunk: Chunk) -> TokenLogits:
        return self.target.of(chunk)

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(
            active=available,
            needs_teacher=available,
            needs_reference=available & self.needs_reference,
            credit=self._credit,
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceAnchor(_Distillation):
    """Exact divergence to the reference policy, in every rollout. alpha = 1: KL(S || R)

    It is the KL term of PPO and GRPO without an estimator's noise. Blend it with a coefficient,
    e.g. `Blend` of `GroupRelative` (1.0) and `ReferenceAnchor` (0.001). The gradient is that of the
    divergence at each sampled prefix.

    Args:
        divergence: as in `SelfDistillation`; alpha = 1 is the usual KL(S || R), and there is
            `SquaredFisherRao()`.
        support: as in `SelfDistillation`.

    Raises:
        ValueError: as `SelfDistillation`.
    """

    divergence: FDivergence = Divergence(alpha=1.0)

    @property
    def needs_reference(self) -> bool:
        return True

    def goal(self, chunk: Chunk) -> TokenLogits:
        return chunk.reference()

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(
            active=torch.ones_like(available),
            needs_reference=torch.ones_like(available),
            credit=self._credit,
        )
