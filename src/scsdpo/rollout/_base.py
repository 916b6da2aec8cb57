"""The contract of a rollout engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM
from scsdpo.types import Prompt, Responses, Sampling
from scsdpo.verifiers import Episodes


class Rollout(ABC):
    """Which responses do we learn from?"""

    @abstractmethod
    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        """`sampling.n` responses to each prompt, drawn from the policy as it is now.

        The ids are the sampler's own and are trained on as they are; texts are never tokenised
        again. Tensors are on the policy's device.
        """

    @property
    def plays_episodes(self) -> bool:
        """Whether it has `play`."""
        return False

    def play(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        episodes: Episodes,
    ) -> Responses:
        """As `sample`, where environments answer responses and the policy goes on.

        Args:
            policy: as it is now.
            prompts: the questions; some may have one turn.
            sampling: how often, and how.
            episodes: `sampling.n` of each question, in its order; all of them have a verdict when
                this returns.

        Raises:
            ConfigurationError: if this engine cannot.
        """
        raise ConfigurationError(one_turn(self))

    def held(self, policy: CausalLM, *, apart: bool = False) -> AbstractContextManager[object]:
        """What several calls of `sample` can share while the policy does not change.

        Every rank enters; inside, each samples by itself.

        Args:
            policy: whose weights.
            apart: a rank that fails inside ends by itself. Otherwise all ranks leave together, and
                what one of them raises may be raised on all.
        """
        return nullcontext()

    def absent(self) -> None:  # noqa: B027 - most need nobody else
        """In the place of `sample`, on a rank that has no prompts where others have some."""

    def room(self) -> int | None:
        """Tokens that a prompt and its response may have together; None: as many as they like."""
        return None

    def rows(self, responses: int) -> int:
        """How many of so many responses are in flight at a time."""
        return responses

    def with_rows(self, rows: int) -> "Rollout":
        """The same with at most `rows` in flight; itself if that is not its to decide."""
        return self

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what sampling holds: engines, files, connections. Sampling may go on after."""


def one_turn(rollout: Rollout) -> str:
    """Why an engine cannot play episodes, and what to do."""
    return (
        f"model.rollout: {type(rollout).__name__} draws responses of one turn, and the "
        "environments of these questions answer them and let the policy go on; use HFRollout"
    )
