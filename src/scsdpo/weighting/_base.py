"""The contract of a weighting."""

from abc import ABC, abstractmethod

from torch import Tensor

from scsdpo.types import Outcomes


class Weighting(ABC):
    """How much does each question, and each rollout, count?"""

    @property
    def needs_group(self) -> bool:
        """Whether it compares the rollouts of a question, so that G must be above 1."""
        return False

    @abstractmethod
    def weigh(self, outcomes: Outcomes) -> Tensor:
        """Weights [Q, G] float64 >= 0, known before any forward; 0 drops the rollout's work."""
