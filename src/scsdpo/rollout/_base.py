"""The contract of a rollout engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from scsdpo.contracts import declared
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM
from scsdpo.types import Prompt, Responses, Sampling
from scsdpo.verifiers import Episodes


class Drawing(ABC):
    """Responses that were asked for, and may still be drawn while the trainer does other things."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether all of them are there."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Of the weights that were the newest when they were asked for."""

    @abstractmethod
    def responses(self) -> Responses:
        """Wait for them; whatever has failed meanwhile is raised here."""


class Drawn(Drawing):
    """Responses that are there.

    Args:
        responses: these.
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
    """Which responses do we learn from?

    An engine needs `sample` alone, and `play` for questions whose environments answer responses;
    the other methods have defaults that suit an engine in this
    process without a limit of its own. A trainer calls them in this order:

    1. Before anything is loaded `check_installed`, and before weights are `max_length`: a run
       whose longest prompt leaves no room for `max_new_tokens` is refused.
    2. For each batch `rows_in_flight`, then, inside `hold_weights`, `with_max_rows(rows).sample`.
       Where that runs out of memory, on any rank, it is called again with half the rows. A rank
       that has no prompts calls `sample_nothing` instead.
    3. Over a validation or a prediction `hold_weights(barrier=False)` stands around all batches.
    4. At the end, and after a failure, `close`.

    On several ranks each rank has its own prompts and calls its own engine. Ranks call
    `hold_weights` equally often and in step; inside it they may call `sample` as often as each
    likes. An engine that communicates inside `sample` must do so in `sample_nothing` too.

    What cannot be done is a `ConfigurationError` that names the key and the remedy; an engine that
    went away is a `TrainingStopped`. Out of memory is passed on as the allocator raised it.
    """

    @abstractmethod
    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        """`sampling.n` responses to each prompt, drawn from the policy as it is now.

        `Responses.of_one_turn` makes the result, on the policy's device:

        * `ids` are those that were drawn, the end included. They are trained on as they are; texts
          are never tokenised again.
        * A response ends with one of `policy.chat.eos_ids`, behind one of
          `sampling.stops(prompt)`, or at `sampling.max_new_tokens`; `ended` is False for the last.
        * `sampling_logprobs` are those of the distribution drawn from: softmax(logits /
          temperature), cut to top-k, top-p and min-p. `policy_logprobs` are those before the cut,
          nan where the engine does not know them.
        * `texts` are `policy.chat.decode(ids)`, one for each response.
        * `version` names the weights in records; '' if they have no name.

        Which token is drawn should depend on `scsdpo.seeds.resolved(sampling.seed)`, `prompt.key`,
        `prompt.copy * sampling.n` + the response's number, and the position only, so that a run
        does not change with the batch's order or the number of ranks. The policy and the random
        state of torch and Python are as before afterwards.

        Args:
            policy: whose weights; may be sharded (`CausalLM.sampling_mode` gives them whole).
            prompts: rendered, at least one; `ids` are what the policy reads.
            sampling: how many responses, how long, and from which distribution.
        """

    @declared
    def can_be_asked(self) -> bool:
        """Whether `sample` takes any ids as a prompt.

        The self-check then asks for a few tokens before the first step, and compares what the
        engine says of them with what the trainer does.
        """
        return False

    @declared
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

    @declared
    def draws_behind(self) -> bool:
        """Whether `begin` returns before the responses are drawn."""
        return False

    def begin(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        within: bool = False,
    ) -> Drawing:
        """As `sample`, of an engine that draws while the trainer learns (`model.ahead`).

        Each token is drawn with the weights of this moment, or with those of a later `begin`;
        `labels` say which. Several drawings may be under way, and `sample` answers beside them.

        Args:
            policy: as it is now.
            prompts: the questions, each of one turn.
            sampling: how often, and how.
            within: whether weights may change amid a response. False: each is of one version.
        """
        return Drawn(self.sample(policy, prompts, sampling))

    def hold_weights(
        self, policy: CausalLM, *, barrier: bool = True
    ) -> AbstractContextManager[object]:
        """Keep the policy's weights loaded over several calls of `sample`.

        Inside, nothing changes the policy. All ranks must enter; gathering shards and bringing
        weights to an engine belongs here, for it may be collective. Calls nest: an inner one does
        nothing.

        Args:
            policy: whose weights.
            barrier: leaving waits for all ranks, and an error inside on one rank may be raised on
                all. False: each rank leaves by itself, with its own error.
        """
        return nullcontext()

    def sample_nothing(self) -> None:  # noqa: B027 - most engines need no other rank
        """Take part where other ranks `sample`, on a rank that has no prompts."""

    def check_installed(self) -> None:  # noqa: B027 - most engines need no other package
        """Refuse an engine whose package is not there, before anything is loaded."""

    def max_length(self) -> int | None:
        """Tokens that a prompt and its response may have together; None: no limit."""
        return None

    def rows_in_flight(self, responses: int) -> int:
        """How many of `responses` responses are drawn at a time, at most; at least 1."""
        return responses

    def with_max_rows(self, rows: int) -> "Rollout":
        """An engine with at most `rows` responses in flight; itself if it cannot have fewer.

        The responses must not depend on it, but for rounding.
        """
        return self

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Give back what sampling holds: engines, files, connections. `sample` may start anew."""


def one_turn(rollout: Rollout) -> str:
    """Why an engine cannot play episodes, and what to do."""
    return (
        f"model.rollout: {type(rollout).__name__} draws responses of one turn, and the "
        "environments of these questions answer them and let the policy go on; use HFRollout or "
        "VLLMRollout"
    )
