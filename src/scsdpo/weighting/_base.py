"""The contract of a weighting."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

from scsdpo import contracts
from scsdpo.contracts import declared
from scsdpo.policy import CausalLM
from scsdpo.types import Judged


class Weighting(ABC):
    """How much each question, and each rollout, counts."""

    @declared
    def needs_group(self) -> bool:
        """True if it compares the rollouts of a question, so that G must be above 1."""
        return False

    def configure(self, policy: CausalLM) -> None:  # noqa: B027 - most need not
        """Look at the policy when its weights are loaded, before any training.

        Raises:
            ConfigurationError: if the weighting was made for another policy.
        """

    def check_questions(self, keys: Iterable[str]) -> None:  # noqa: B027 - most need not
        """Look at the training questions' keys, before the weights are loaded.

        Each key is computed when it is read, which takes time: read them only if needed.

        Raises:
            ConfigurationError: if the weighting was made for other questions.
        """

    @abstractmethod
    def weigh(self, judged: Judged) -> Tensor:
        """Weights [Q, G], >= 0 and finite. A rollout of weight 0 is not run.

        It may be called several times for a batch, and changes nothing. A weighting that remembers
        is a `scsdpo.state.Stateful`, whose `observe` is called once a batch.
        """

    def weights(self, judged: Judged) -> Tensor:
        """`weigh`, checked and as float64.

        Raises:
            ConfigurationError: if `weigh` does not return such a table.
        """
        return contracts.weights(
            self.weigh(judged),
            of=f"{type(self).__name__}.weigh",
            axes="[Q, G]",
            shape=tuple(judged.rewards.shape),
        )
