"""The abstract class of rollout engines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from scsdpo.contracts import declared
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM
from scsdpo.types import Prompt, Responses, Sampling
from scsdpo.verifiers import Episodes


class Drawing(ABC):
    """Responses that were requested. The engine may still draw them while the trainer works."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """True once all responses are drawn."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Label of the newest weights at the time of the request."""

    @abstractmethod
    def responses(self) -> Responses:
        """Wait for the responses. An error of the engine is raised here."""


class Drawn(Drawing):
    """Responses that are drawn already.

    Args:
        responses: the responses.
    """

    def __init__(self, responses: Responses) -> None:
        self._responses = responses

    @property
    def is_done(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return self._responses.version

    def responses(self) -> Responses:
        return self._responses


class Rollout(ABC):
    """An engine that draws responses from the policy.

    An engine must define `sample`, and `play` if it supports environments that answer responses.
    The defaults of the other methods suit an engine in this process without a limit of its own. A
    trainer calls the methods in this order:

    1. Before anything is loaded `check_installed`, and before weights are `max_length`: a run
       whose longest prompt leaves no room for `max_new_tokens` is refused.
    2. For each batch `rows_in_flight`, then, inside `hold_weights`, `with_max_rows(rows).sample`.
       If that runs out of memory on any rank, it is called again with half the rows. A rank
       without prompts calls `sample_nothing` instead.
    3. Around all batches of a validation or a prediction, `hold_weights(barrier=False)`.
    4. At the end, and after a failure, `close`.

    Each rank has its own prompts and calls its own engine. All ranks call `hold_weights` equally
    often and in the same order. Inside it each rank may call `sample` any number of times. An
    engine that communicates inside `sample` must also do so in `sample_nothing`.

    Raise a `ConfigurationError` that names the key and the remedy for a request that the engine
    cannot serve, and a `TrainingStopped` if the engine is lost. Do not catch the allocator's
    out-of-memory errors.
    """

    @abstractmethod
    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        """Draw `sampling.n` responses to each prompt from the policy's current weights.

        Build the result by `Responses.of_one_turn`, on the policy's device:

        * `ids` are the drawn tokens, the end included. The policy is trained on these; texts are
          never tokenised again.
        * A response ends with one of `policy.chat.eos_ids`, after one of
          `sampling.stops(prompt)`, or at `sampling.max_new_tokens`. `ended` is False for the last.
        * `sampling_logprobs` are under the distribution drawn from: softmax(logits / temperature),
          cut to top-k, top-p and min-p. `policy_logprobs` are under the distribution before the
          cut, and nan if the engine does not know them.
        * `texts` are `policy.chat.decode(ids)`, one for each response.
        * `version` names the weights in records; '' if they have no name.

        The choice of a token should depend on `scsdpo.seeds.resolved(sampling.seed)`, `prompt.key`,
        `prompt.copy * sampling.n` + the response's number, and the position only, so that a run
        does not change with the batch's order or the number of ranks. Leave the policy and the
        random states of torch and Python as they were.

        Args:
            policy: draw from its weights, which may be sharded (`CausalLM.sampling_mode` gathers
                them).
            prompts: rendered, at least one; the policy reads their `ids`.
            sampling: number of responses, their length, and the distribution.
        """

    @declared
    def can_be_asked(self) -> bool:
        """True if `sample` accepts any ids as a prompt.

        The self-check then draws a few tokens before the first step, and compares the engine's
        log-probs with the trainer's.
        """
        return False

    @declared
    def plays_episodes(self) -> bool:
        """True if the engine defines `play`."""
        return False

    def play(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        episodes: Episodes,
    ) -> Responses:
        """Draw episodes: as `sample`, but environments answer responses and the policy goes on.

        Args:
            policy: draw from its current weights.
            prompts: the questions; some may have a single turn.
            sampling: number of episodes, their length, and the distribution.
            episodes: `sampling.n` of each question, in the order of `prompts`; all have a verdict
                when this returns.

        Raises:
            ConfigurationError: if this engine cannot play episodes.
        """
        raise ConfigurationError(one_turn(self))

    @declared
    def draws_behind(self) -> bool:
        """True if `begin` returns before the responses are drawn."""
        return False

    def begin(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        within: bool = False,
    ) -> Drawing:
        """Request responses, to be drawn while the trainer learns (`model.ahead`).

        Each token is drawn with the current weights or with those of a later `begin`; `labels` of
        the result say which. Several requests may be open, and `sample` works beside them.

        Args:
            policy: its current weights are sent to the engine.
            prompts: the questions, each of a single turn.
            sampling: number of responses, their length, and the distribution.
            within: True: weights may change in the middle of a response. False: all tokens of a
                response come from one version.
        """
        return Drawn(self.sample(policy, prompts, sampling))

    def hold_weights(
        self, policy: CausalLM, *, barrier: bool = True
    ) -> AbstractContextManager[object]:
        """Keep the policy's weights loaded over several calls of `sample`.

        Nothing changes the policy while the context is open. All ranks must enter it, so collective
        work belongs here, such as gathering shards and sending weights to an engine. Contexts nest:
        an inner one does nothing.

        Args:
            policy: keep its weights.
            barrier: True: leaving waits for all ranks, and an error on one rank may be raised on
                all. False: each rank leaves without waiting, with its own error.
        """
        return nullcontext()

    def sample_nothing(self) -> None:  # noqa: B027 - most engines need no other rank
        """Take part in the collectives of `sample` on a rank that has no prompts."""

    def check_installed(self) -> None:  # noqa: B027 - most engines need no other package
        """Refuse an engine whose package is not there, before anything is loaded."""

    def max_length(self) -> int | None:
        """Most tokens of a prompt and its response together; None: no limit."""
        return None

    def rows_in_flight(self, responses: int) -> int:
        """Most of `responses` responses that are drawn at a time; at least 1."""
        return responses

    def with_max_rows(self, rows: int) -> "Rollout":
        """An engine that draws at most `rows` responses at a time; `self` if there is no choice.

        The responses must not depend on `rows`, up to rounding.
        """
        return self

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Free engines, files and connections; a later `sample` may start them again."""


def one_turn(rollout: Rollout) -> str:
    """Error message for an engine that cannot play episodes."""
    return (
        f"model.rollout: {type(rollout).__name__} samples responses of one turn, but these "
        "questions have environments of several turns: use HFRollout or VLLMRollout"
    )
