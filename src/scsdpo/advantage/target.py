"""Targets of distillation: the teacher's distribution, or one made from it."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.advantage.divergence import Divergence
from scsdpo.contracts import declared
from scsdpo.distributed import all_values
from scsdpo.loss import Chunk, Derivation, NeedsSignals, Signals, TokenLogits
from scsdpo.state import Constant, Schedule


class Target(NeedsSignals, ABC):
    """The distribution that the student is moved towards. It is detached, but may read S."""

    @declared
    def needs_reference(self) -> bool:
        """True if it reads the reference."""
        return False

    @declared
    def contexts(self) -> int:
        """Number of contexts that the teacher must have (`Contexts`)."""
        return 1

    @abstractmethod
    def of(self, chunk: Chunk) -> TokenLogits:
        """The target distribution at the chunk's n positions."""


@dataclass(frozen=True)
class AsTaught(Target):
    """The teacher's own distribution."""

    def of(self, chunk: Chunk) -> TokenLogits:
        return chunk.teacher()


@dataclass(frozen=True, kw_only=True)
class LogitMix(Target):
    """Z = (1 - share) z_S + share z_T: the target is ~ S^(1 - share) T^share.

    share = 1 is `AsTaught`; share = 0 is S itself, with no credit.

    Args:
        share: the teacher's share, in [0, 1]; a schedule may change it with the steps.

    Raises:
        ValueError: if `share` leaves [0, 1].

    Source:
        beta-OPSD, arXiv:2607.28582: from .5 to .8 over 200 steps.
    """

    share: Schedule = Constant(0.5)

    def __post_init__(self) -> None:
        low, high = self.share.bounds
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`LogitMix(share=...)` must stay in [0, 1], got {low} to {high}")

    def of(self, chunk: Chunk) -> TokenLogits:
        student, teacher = chunk.student, chunk.teacher()
        return TokenLogits(torch.lerp(student.logits, teacher.logits, self.share.value()))


@dataclass(frozen=True, kw_only=True)
class DivergenceMix(Target):
    """A mix with less of the teacher where it is far from the student. target ~ T^(1 - a) S^a

    a = 2 most (sigmoid(sharpness JSD(S, T)) - 1/2) in [0, most), JSD at that position in nats.

    Args:
        most: largest share of the student, in [0, 1].
        sharpness: slope of a, per nat, >= 0; 0 is `AsTaught`.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        DemoPSD, arXiv:2607.02502.
    """

    most: float = 0.5
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 1:
            raise ValueError(f"`DivergenceMix(most=...)` must be in [0, 1], got {self.most}")
        if self.sharpness < 0:
            raise ValueError(f"`DivergenceMix(sharpness=...)` must be >= 0, got {self.sharpness}")

    def of(self, chunk: Chunk) -> TokenLogits:
        student, teacher = chunk.student, chunk.teacher()
        _, jsd = Divergence(alpha=0.5).credit(student.log_probs, teacher.log_probs)
        share = 2 * self.most * (torch.sigmoid(self.sharpness * jsd) - 0.5)
        # A mix of log-probs, for logits may have different offsets at each position.
        return TokenLogits(torch.lerp(teacher.log_probs, student.log_probs, share[:, None]))


@dataclass(frozen=True, kw_only=True)
class PriorAtForks(Target):
    """AD-OPSD's target: the reference R instead of the teacher at forks. target = U R + (1 - U) T

        U_t = sigmoid(S(y) (log S(y) - log T(y)) / temperature)   if S(y) > T(y) at a fork, else 0

    A fork is a token whose entropy H(S) is among the highest `fork_share` of the tokens that the
    optimizer step runs, over all ranks. A teacher that knows the answer would suppress tokens such
    as "wait" there. U, in [1/2, 1), keeps them as likely as the first policy has them.
    fork_share = 0 is `AsTaught`.

    Args:
        fork_share: share of the tokens that are forks, in [0, 1].
        temperature: temperature of the gate U, > 0.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        AD-OPSD, arXiv:2607.10805, eq. (5), with .2 and 1. The gate is that of the sampled token, so
        that the target sums to one.
    """

    fork_share: float = 0.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.fork_share <= 1:
            raise ValueError(
                f"`PriorAtForks(fork_share=...)` must be in [0, 1], got {self.fork_share}"
            )
        if not self.temperature > 0:
            raise ValueError(f"`PriorAtForks(temperature=...)` must be > 0, got {self.temperature}")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student_entropy"})

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (self.forks,)

    def forks(self, signals: Signals) -> Tensor:
        """[R, L]: 1 at forks, else 0."""
        entropy = signals.student_entropy
        run = entropy[signals.mask & (entropy > 0)]  # rows that are not run have entropy 0
        everyone = all_values(run)
        highest = everyone.topk(math.ceil(self.fork_share * len(everyone))).values
        lowest = highest[-1] if len(highest) else math.inf
        return (signals.mask & (entropy >= lowest)).double()

    def of(self, chunk: Chunk) -> TokenLogits:
        teacher = chunk.teacher()
        gap = chunk.logprob - teacher.logprob(chunk.ids)
        held = (gap > 0) & (chunk.derived(self.forks) > 0)
        gate = torch.sigmoid(chunk.logprob.exp() * gap / self.temperature)
        share = torch.where(held, gate, 0.0)[:, None]
        parts = chunk.reference().log_probs + share.log(), teacher.log_probs + (-share).log1p()
        return TokenLogits(torch.logaddexp(*parts))


@dataclass(frozen=True, kw_only=True)
class Purified(Target):
    """The solution's effect beyond that of its own words. target ~ P0 exp(d / sharpness)

        d = log T - log R, minus its mean over the vocabulary, then bound tanh(d / bound)

    The teacher has three contexts, in this order: question and solution (T), the solution without
    the question (R), the question alone (P0). Tokens that the solution's words make likely for any
    question cancel in d. Use it with `Full()` support: mean and target are over the vocabulary.

    Args:
        bound: bound of |d|, in nats, > 0.
        sharpness: divisor of d, > 0.

    Raises:
        ValueError: if an argument is not above 0.

    Source:
        Purified OPSD, arXiv:2607.02234: c = 10 and beta = 1.
    """

    bound: float = 10.0
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        for name in ("bound", "sharpness"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`Purified({name}=...)` must be > 0, got {value}")

    @property
    def contexts(self) -> int:
        return 3

    def of(self, chunk: Chunk) -> TokenLogits:
        alone, plain = (other().log_probs for other in chunk.others[:2])
        d = chunk.teacher().log_probs - alone
        d = self.bound * torch.tanh((d - d.mean(-1, keepdim=True)) / self.bound)
        return TokenLogits(plain + d / self.sharpness)
