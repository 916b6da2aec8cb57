"""The contract of a selection."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from scsdpo.types import Outcomes, Rollouts

Judged = tuple[Rollouts, Outcomes]
"""Rollouts and their verdicts."""


class Selection(ABC):
    """Which groups of judged rollouts are learned from, and when."""

    @property
    def needs_group(self) -> bool:
        """Whether it compares the rollouts of a question, so that G must be above 1."""
        return False

    @abstractmethod
    def select(self, rollouts: Rollouts, outcomes: Outcomes) -> tuple[Judged, ...]:
        """The batch to learn from now, or none yet; the same on every rank."""

    def preview(self, rollouts: Rollouts, outcomes: Outcomes) -> Judged:
        """What of one batch would be learned from; nothing is remembered."""
        return rollouts, outcomes


@dataclass(frozen=True)
class Everything(Selection):
    """What was sampled is learned from, at once."""

    def select(self, rollouts: Rollouts, outcomes: Outcomes) -> tuple[Judged, ...]:
        return ((rollouts, outcomes),)
