"""The contract of an advantage: a plan from verdicts alone, then credit chunk by chunk."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scsdpo import contracts
from scsdpo.contracts import declared
from scsdpo.errors import ConfigurationError
from scsdpo.loss import Chunk, Credit, Derivation, NeedsSignals
from scsdpo.types import Judged
from scsdpo.weighting import Weighting

NOBODY = torch.tensor(False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """The rollouts that can get credit, known before any forward. Others are not computed."""

    active: Tensor
    """[Q, G] bool: rollouts whose credit may be other than zero."""
    credit: Callable[[Chunk], Credit]
    """Gives the credit of a chunk of tokens of active rollouts."""
    needs_teacher: Tensor = NOBODY
    """[Q, G] bool: rollouts whose credit reads the teacher; a scalar holds for all rollouts."""
    needs_reference: Tensor = NOBODY
    """[Q, G] bool: rollouts whose credit reads the reference; a scalar holds for all rollouts."""
    derivations: tuple[Derivation, ...] = ()
    """Further `Advantage.derivations`, whose tables depend on the batch's verdicts."""

    def __post_init__(self) -> None:
        for name in ("needs_teacher", "needs_reference"):
            mask = getattr(self, name)
            if isinstance(mask, Tensor) and isinstance(self.active, Tensor) and mask.dim() == 0:
                object.__setattr__(self, name, mask.to(self.active.device).expand_as(self.active))


def rows_of(mask: Tensor) -> frozenset[int]:
    """Flat indices q * G + g of the rollouts in `mask` [Q, G].

    The host gets them once a batch, so that it does not wait for a GPU in each chunk.
    """
    return frozenset(mask.flatten().nonzero()[:, 0].tolist())


class Advantage(NeedsSignals, ABC):
    """Gives credit c(v) to each vocabulary entry at each position of a response.

    The loss's gradient is d loss / d theta = -sum_v c(v) d log S(v) / d theta, c detached.
    """

    @declared
    def needs_teacher(self) -> bool:
        """True if the credit reads a teacher, so that the configuration must have one."""
        return False

    @declared
    def needs_reference(self) -> bool:
        """True if the credit reads a reference, so that the configuration must have one."""
        return False

    @declared
    def contexts(self) -> int:
        """Number of contexts that the teacher must have (`Contexts`)."""
        return 1

    @declared
    def needs_group(self) -> bool:
        """True if it compares the rollouts of a question, so that G must be above 1."""
        return False

    @declared
    def has_ratio(self) -> bool:
        """True if the credit has the ratio S / S_old to the policy before the first update."""
        return False

    @declared
    def weightings(self) -> tuple[Weighting, ...]:
        """The weightings of its parts, which are configured before training as all others."""
        return ()

    @declared
    def objective_name(self) -> str:
        """Name of the mean objective in the log."""
        return "objective"

    @abstractmethod
    def plan(self, judged: Judged, available: Tensor) -> Plan:
        """The plan for one batch of rollouts. It may be called several times, and changes nothing.

        Args:
            judged: the responses and their verdicts.
            available: [Q, G] bool: the rollout has a teacher prompt.
        """

    def planned(self, judged: Judged, available: Tensor) -> Plan:
        """Return `plan` with its shapes checked. Its first credit is checked when it is made.

        Raises:
            ConfigurationError: if masks or credit do not have the shapes of a `Plan`.
        """
        plan, name = self.plan(judged, available), type(self).__name__
        shape = tuple(judged.rewards.shape)
        for field in ("active", "needs_teacher", "needs_reference"):
            contracts.mask(
                getattr(plan, field), of=f"{name}.plan, {field}", axes="[Q, G]", shape=shape
            )
        return replace(plan, credit=_CheckedCredit(name, plan.credit))


class _CheckedCredit:
    """A plan's credit. The first chunk's is checked, once a batch."""

    def __init__(self, name: str, credit: Callable[[Chunk], Credit]) -> None:
        self.name, self.credit, self.checked = name, credit, False

    def __call__(self, chunk: Chunk) -> Credit:
        credit = self.credit(chunk)
        if not self.checked:
            if not isinstance(credit, Credit):
                raise ConfigurationError(
                    f"`{self.name}`: a plan's credit must be a DenseCredit, SparseCredit or "
                    f"SumCredit, got {type(credit).__name__}"
                )
            credit.check(self.name, chunk.student.logits.shape)
            self.checked = True
        return credit.to(chunk.logprob.dtype)
