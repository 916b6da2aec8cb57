"""The contract of a weighting."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

from scsdpo import contracts
from scsdpo.contracts import declared
from scsdpo.policy import CausalLM
from scsdpo.types import Judged


class Weighting(ABC):
    """How much does each question, and each rollout, count?"""

    @declared
    def needs_group(self) -> bool:
        """Whether it compares the rollouts of a question, so that G must be above 1."""
        return False

    def configure(self, policy: CausalLM) -> None:  # noqa: B027 - most need not
        """Look at the policy once its weights are loaded, before any training.

        Raises:
            ConfigurationError: if the weighting was made for another one.
        """

    def check_questions(self, keys: Iterable[str]) -> None:  # noqa: B027 - most need not
        """Look at the training questions' keys, before the weights are loaded.

        They are made as they are asked for, which takes time: ask only if need be.

        Raises:
            ConfigurationError: if the weighting was made for others.
        """

    @abstractmethod
    def weigh(self, judged: Judged) -> Tensor:
        """Weights [Q, G] >= 0 and finite, known before any forward; 0 drops the rollout's work.

        It may be asked several times and changes nothing: a weighting that remembers is a
        `scsdpo.state.Stateful`, whose `observe` is called once a batch.
        """

    def weights(self, judged: Judged) -> Tensor:
        """What `weigh` gives, as float64.

        Raises:
            ConfigurationError: if that is no such table.
        """
        return contracts.weights(
            self.weigh(judged),
            of=f"{type(self).__name__}.weigh",
            axes="[Q, G]",
            shape=tuple(judged.rewards.shape),
        )
