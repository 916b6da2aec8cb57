"""The contract of an advantage: plan from verdicts alone, then credit chunk by chunk."""

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
    """Who can get credit, known before any forward; the rest is not computed at all."""

    active: Tensor
    """[Q, G] bool: rollouts whose credit may be other than zero."""
    credit: Callable[[Chunk], Credit]
    """Credit of a chunk of tokens of active rollouts."""
    needs_teacher: Tensor = NOBODY
    """[Q, G] bool: rollouts whose credit reads the teacher; a scalar counts for all of them."""
    needs_reference: Tensor = NOBODY
    """[Q, G] bool: rollouts whose credit reads the reference; a scalar counts for all of them."""
    derivations: tuple[Derivation, ...] = ()
    """Tables like those of `Advantage.derivations`, if they depend on the batch's verdicts."""

    def __post_init__(self) -> None:
        for name in ("needs_teacher", "needs_reference"):
            mask = getattr(self, name)
            if isinstance(mask, Tensor) and isinstance(self.active, Tensor) and mask.dim() == 0:
                object.__setattr__(self, name, mask.to(self.active.device).expand_as(self.active))


def chosen(mask: Tensor) -> frozenset[int]:
    """Flat indices of the rollouts that `mask` [Q, G] names: told to the host once a batch, so that
    no chunk need ask a GPU.
    """
    return frozenset(mask.flatten().nonzero()[:, 0].tolist())


class Advantage(NeedsSignals, ABC):
    """What credit does each vocabulary entry get at each position?"""

    @declared
    def needs_teacher(self) -> bool:
        """Whether it is meaningless without a teacher."""
        return False

    @declared
    def needs_reference(self) -> bool:
        """Whether it is meaningless without a reference."""
        return False

    @declared
    def contexts(self) -> int:
        """How many contexts its teacher must have (`Contexts`); 1: any."""
        return 1

    @declared
    def needs_group(self) -> bool:
        """Whether it compares the rollouts of a question, so that one alone gives no signal."""
        return False

    @declared
    def has_ratio(self) -> bool:
        """Whether its credit has the ratio S / S_old to the policy before the first update."""
        return False

    @declared
    def weightings(self) -> tuple[Weighting, ...]:
        """Those of its parts: they are shown the policy and the questions before training."""
        return ()

    @declared
    def objective_name(self) -> str:
        """What the mean objective is called in the log."""
        return "objective"

    @abstractmethod
    def plan(self, judged: Judged, available: Tensor) -> Plan:
        """The plan for one batch of rollouts; it may be asked several times and changes nothing.

        Args:
            judged: the responses and their verdicts.
            available: [Q, G] bool: the rollout has a teacher prompt.
        """

    def planned(self, judged: Judged, available: Tensor) -> Plan:
        """What `plan` gives, checked; and its first credit, before it is used.

        Raises:
            ConfigurationError: if masks or credit are not of the shapes that a `Plan` says.
        """
        plan, name = self.plan(judged, available), type(self).__name__
        shape = tuple(judged.rewards.shape)
        for field in ("active", "needs_teacher", "needs_reference"):
            contracts.mask(
                getattr(plan, field), of=f"{name}.plan, {field}", axes="[Q, G]", shape=shape
            )
        return replace(plan, credit=_CheckedCredit(name, plan.credit))


class _CheckedCredit:
    """A plan's credit; the first chunk's is checked, so that a batch pays once."""

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
