"""The contract of a selection."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from scsdpo.contracts import declared
from scsdpo.types import Judged


class Selection(ABC):
    """Chooses the groups of judged responses that are learned from, and when."""

    @declared
    def needs_group(self) -> bool:
        """True if it compares the rollouts of a question, so that G must be above 1."""
        return False

    @abstractmethod
    def select(self, judged: Judged) -> tuple[Judged, ...]:
        """The batch to learn from now, or none yet; all ranks return one, or all return none.

        It is called once for each sampled batch, and may keep groups for later.
        """

    def preview(self, judged: Judged) -> Judged:
        """The part of one batch that would be learned from. It changes nothing."""
        return judged


@dataclass(frozen=True)
class Everything(Selection):
    """Each sampled batch is learned from at once, with all its groups."""

    def select(self, judged: Judged) -> tuple[Judged, ...]:
        return (judged,)
