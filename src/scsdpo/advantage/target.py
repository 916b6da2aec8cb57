"""Targets of distillation: the teacher's distribution, or one between it and the student's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from scsdpo.advantage.divergence import Divergence
from scsdpo.loss import TokenLogits
from scsdpo.state import Constant, Schedule


class Target(ABC):
    """What the student is moved towards; detached, though it may look at the student."""

    @abstractmethod
    def of(self, student: TokenLogits, teacher: TokenLogits) -> TokenLogits:
        """The target distribution at n positions."""


@dataclass(frozen=True)
class AsTaught(Target):
    """The teacher's own distribution."""

    def of(self, student: TokenLogits, teacher: TokenLogits) -> TokenLogits:
        return teacher


@dataclass(frozen=True, kw_only=True)
class LogitMix(Target):
    """Z = (1 - share) z_S + share z_T: the target is ~ S^(1 - share) T^share.

    share = 1 is `AsTaught`; at 0 there is nothing to learn.

    Args:
        share: of the teacher, in [0, 1]; it may change with the steps.

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

    def of(self, student: TokenLogits, teacher: TokenLogits) -> TokenLogits:
        return TokenLogits(torch.lerp(student.logits, teacher.logits, self.share.value()))


@dataclass(frozen=True, kw_only=True)
class DivergenceMix(Target):
    """Less of the teacher where it is far away. target ~ T^(1 - a) S^a

    a = 2 most (sigmoid(sharpness JSD(S, T)) - 1/2) in [0, most), JSD at that position in nats.

    Args:
        most: largest share of the student, in [0, 1].
        sharpness: per nat, >= 0; 0 is `AsTaught`.

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

    def of(self, student: TokenLogits, teacher: TokenLogits) -> TokenLogits:
        _, jsd = Divergence(alpha=0.5).credit(student.log_probs, teacher.log_probs)
        share = 2 * self.most * (torch.sigmoid(self.sharpness * jsd) - 0.5)
        # Of log-probs and not of logits: an offset of one of them must not matter.
        return TokenLogits(torch.lerp(teacher.log_probs, student.log_probs, share[:, None]))
