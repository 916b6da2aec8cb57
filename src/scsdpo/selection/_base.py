"""The contract of a selection."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from scsdpo.contracts import declared
from scsdpo.types import Judged


class Selection(ABC):
    """Which groups of judged responses are learned from, and when."""

    @declared
    def needs_group(self) -> bool:
        """Whether it compares the rollouts of a question, so that G must be above 1."""
        return False

    @abstractmethod
    def select(self, judged: Judged) -> tuple[Judged, ...]:
        """The batch to learn from now, or none yet; the same on every rank.

        Called once for each batch that was sampled: what it holds back, it remembers here.
        """

    def preview(self, judged: Judged) -> Judged:
        """What of one batch would be learned from; nothing is remembered."""
        return judged


@dataclass(frozen=True)
class Everything(Selection):
    """What was sampled is learned from, at once."""

    def select(self, judged: Judged) -> tuple[Judged, ...]:
        return (judged,)
