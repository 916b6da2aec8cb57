"""The contract of a weighting."""

from abc import ABC, abstractmethod

from torch import Tensor

from scsdpo.policy import CausalLM
from scsdpo.types import Outcomes


class Weighting(ABC):
    """How much does each question, and each rollout, count?"""

    @property
    def needs_group(self) -> bool:
        """Whether it compares the rollouts of a question, so that G must be above 1."""
        return False

    def configure(self, policy: CausalLM) -> None:  # noqa: B027 - most need not
        """Look at the policy once its weights are loaded, before any training.

        Raises:
            ConfigurationError: if the weighting was made for another one.
        """

    @abstractmethod
    def weigh(self, outcomes: Outcomes) -> Tensor:
        """Weights [Q, G] float64 >= 0, known before any forward; 0 drops the rollout's work."""
