"""Questions, verdicts, verifiers and environments.

This module does not import torch, for the processes that judge responses import it.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ClassVar, Literal

from scsdpo.thinking import behind_thinking

Message = dict[str, str]
"""One chat turn, `{"role": ..., "content": ...}`."""
ToolSchema = dict[str, Any]
"""One function that the policy may call, `{"type": "function", "function": {"name": ...,
"description": ..., "parameters": <JSON schema>}}`, as chat templates take it."""


def stable_hash(*parts: object) -> int:
    """A 63-bit hash of `parts` that is equal in all processes (unlike `hash`)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """One question, as a data source yields it."""

    key: str
    """Identity of the question: the same after a restart, on every rank, in every order."""
    messages: tuple[Message, ...]
    """Chat turns; the last one is the user's."""
    verifier: "Environment"
    """Gives responses to this prompt a `Verdict`: a `Verifier` after one turn, or another
    `Environment` after several."""
    answer: str
    """The gold answer, in the form that `verifier` compares with; the policy never reads it."""
    tools: tuple[ToolSchema, ...] = ()
    """Functions that the policy may call, which the chat template writes into the prompt. If empty,
    those that the environment offers."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the question's row, which the environment reads."""
    category: str = ""
    """A category, such as a difficulty or a domain, whose validation accuracy is reported
    separately."""
    stop: tuple[str, ...] = ()
    """Strings that end a response to this prompt, beside those of `Sampling.stop`."""
    response_template: Mapping[str, Any] = field(default_factory=dict)
    """The tokenizer's template to parse responses (`parse_response` of transformers); empty: it has
    none."""
    ids: tuple[int, ...] = ()
    """Token ids of the rendered prompt, generation header included; empty until it is rendered."""
    copy: int = 0
    """Number of times that the same question stands before this one in the training batch, over all
    ranks, or in the validation. Its response i is drawn and recorded as response copy G + i."""
    thinking: str = ""
    """Thinking tags that the rendered prompt leaves open, such as <think>, so that the response
    begins with thinking."""

    def __post_init__(self) -> None:
        # Done here, so that a user's own data source cannot forget it.
        if not self.tools and isinstance(self.verifier, Environment):
            object.__setattr__(self, "tools", tuple(self.verifier.offered(self)))

    @property
    def has_turns(self) -> bool:
        """True if the environment may answer a response, so that another one follows."""
        return isinstance(self.verifier, Environment) and not isinstance(self.verifier, Verifier)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """The environment's answer to a response that does not end the episode."""

    messages: tuple[Message, ...]
    """Chat turns in the roles `tool` (with a `name`) or `user`; at least one."""
    feedback: str = ""
    """Says what was wrong with the response, for the teacher; the policy does not read it. May be
    empty."""
    reward: float = 0.0
    """Reward of the turn, for credit by turn (`TurnRelative`). The episode's reward is its
    verdict's; turn rewards do not change it."""
    calls: int = 0
    """Number of tool calls in the response, for figures."""
    failed: int = 0
    """Number of these calls that could not be parsed or made, or raised."""

    @classmethod
    def said(cls, text: str, *, feedback: str = "", reward: float = 0.0) -> "Observation":
        """An observation of one user turn."""
        said = {"role": "user", "content": text}
        return cls(messages=(said,), feedback=feedback, reward=reward)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One message of an episode: a response of the policy, or an answer of the environment."""

    role: str
    """`assistant` for the policy; `tool` or `user` for the environment."""
    text: str
    name: str = ""
    """Name of the tool that answered."""
    feedback: str = ""
    """`Observation.feedback` on the response before it."""
    reward: float = 0.0
    """`Observation.reward` of the response before it."""
    calls: int = 0
    """`Observation.calls` of the response before it."""
    failed: int = 0
    """`Observation.failed` of the response before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """The messages of a rollout of several turns, and its verdict."""

    parts: tuple[Part, ...] = ()
    """Messages in order; none: a rollout of one turn."""
    verdict: "Verdict | None" = None
    """The environment's verdict; None: not judged yet."""

    @property
    def turns(self) -> int:
        """Number of responses of the policy."""
        return sum(part.role == "assistant" for part in self.parts) or 1

    @property
    def rewards(self) -> tuple[float, ...]:
        """`Observation.reward` of each turn; the verdict's reward is not in them."""
        earned: list[float] = []
        for part in self.parts:
            if part.role == "assistant":
                earned.append(0.0)
            else:
                earned[-1] += part.reward
        return tuple(earned)

    def transcript(self, change: Callable[[str], str] = str) -> str:
        """All messages as one text.

        Args:
            change: is applied to each of the policy's responses, e.g. to drop its thinking.
        """
        said = []
        for part in self.parts:
            if part.role == "assistant":
                said.append(change(part.text).strip())
            else:
                who = f"{part.role} {part.name}" if part.name else part.role
                said.append(f"[{who}]\n{part.text}\n[/{part.role}]")
        return "\n\n".join(text for text in said if text)

    @property
    def feedback(self) -> str:
        """The environment's feedback on each turn, and that of its verdict."""
        said, turn = [], 0
        for part in self.parts:
            turn += part.role == "assistant"
            if part.feedback.strip():
                said.append(f"On turn {turn}: {part.feedback}")
        if self.verdict and self.verdict.feedback.strip():
            said.append(self.verdict.feedback)
        return "\n".join(said)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A verifier's judgement of one response."""

    reward: float
    """The reward; for the shipped tasks it is in [0, 1], where 1 is right."""
    answer: str | None = None
    """The extracted answer in canonical spelling, for majority votes; None: there is none."""
    feedback: str = ""
    """Says what is wrong with the response, for the teacher; may be empty."""
    error: str = ""
    """Why the verifier itself failed; it is counted and logged."""
    earned: float = 0.0
    """The part of `reward` that earlier turns have got already as `Observation.reward`. Credit by
    turn gives the last turn the rest. 0: turn rewards are paid beside the episode's reward. Their
    sum: the episode's reward is made of them."""
    stopped: Literal["", "turns", "time"] = ""
    """The limit that ended the episode before the policy was done: the environment's number of
    turns, or the time of a turn or the episode; "": none."""


def _behind_thinking(act: Callable[..., Any], place: int) -> Any:
    """Wrap `verify`, `step` or `finish`, so that it receives `Environment.graded` of a response."""

    @wraps(act)
    def graded_act(self: "Environment", prompt: Prompt, *given: Any, **named: Any) -> Any:
        # `graded` has closed the thinking, which an `act` that calls another one must not repeat.
        bare = replace(prompt, thinking="") if prompt.thinking else prompt
        if "response" in named:
            named["response"] = self.graded(prompt, named["response"])
            return act(self, bare, *given, **named)
        response = self.graded(prompt, given[place])
        return act(self, bare, *given[:place], response, *given[place + 1 :], **named)

    return graded_act


_RESPONSES = {"verify": 0, "step": 1, "finish": 1}
"""Method of an environment -> place of the response among its arguments behind the prompt."""


class Environment(ABC):
    """Answers the policy's responses turn by turn: a game, tools, code with tests.

    `begin` makes a state from a prompt. `step` answers a response with an `Observation`, or ends
    the episode with a `Verdict`. A `Verifier` is an environment that ends after one turn.

    An environment is a frozen dataclass in a module that can be imported, for prompts carry it to
    the processes that judge. All that changes in an episode is in its state, which stays in one
    process. `step` may be slow, hang, raise or exit: only its own episode fails. If a process is
    lost, the episode goes on in another one, where its responses are given to a new state again. So
    equal responses must get equal answers. An environment that cannot do that sets
    `replays = False`, and each of its episodes gets a process of its own.

    `step` and `finish` receive what `graded` makes of a response: the text behind the last end of
    thinking, or "" if thinking has not ended.
    """

    reads_json: ClassVar[bool] = False
    """True if gold answers are JSON, so that a list or a struct in the data is an answer."""
    needs_answer: ClassVar[bool] = False
    """True if it compares with a gold answer, so that rows without one are refused."""
    strip_thinking: bool = True
    """True if it receives only the text behind the thinking (`scsdpo.thinking`)."""
    replays: bool = True
    """True if equal responses get equal observations, in every process."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, place in _RESPONSES.items():
            if name in vars(cls):
                setattr(cls, name, _behind_thinking(vars(cls)[name], place))

    def graded(self, prompt: Prompt, response: str) -> str:
        """The part of a response that `step` and `finish` receive."""
        return behind_thinking(prompt.thinking + response) if self.strip_thinking else response

    def prepare(self) -> None:  # noqa: B027
        """Do what takes long the first time, such as imports; this time counts for no turn.

        It is called in each process that judges, at least once before anything else. An exception
        ends the run, since an environment that cannot work at all is a mistake in the
        configuration. Start helper processes here: those that are started later end with the
        verdict.
        """

    def check(self, prompt: Prompt) -> None:  # noqa: B027
        """Check the prompt's gold answer and row; called in the training process before training.

        Raises:
            ValueError: if no response to the prompt could ever be right.
        """

    def written(self, prompt: Prompt) -> str:
        """A response that gives the gold answer in the form that the task asks for.

        It is judged before training, and a gold answer that is judged wrong is refused. "": the
        environment cannot write one, and gold answers are not checked.
        """
        return ""

    def offered(self, prompt: Prompt) -> Sequence[ToolSchema]:
        """Functions that the policy may call in an episode of `prompt`."""
        return ()

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """The roles of its answers; the chat template must have such turns."""
        return ("tool",) if self.offered(prompt) else ("user",)

    @abstractmethod
    def begin(self, prompt: Prompt) -> Any:
        """The state of a new episode."""

    def opening(self, prompt: Prompt, state: Any) -> tuple[Message, ...]:
        """The chat turns of the question; by default those of the prompt.

        They must be equal for all episodes of a prompt.
        """
        return prompt.messages

    @abstractmethod
    def step(self, prompt: Prompt, state: Any, response: str) -> "Observation | Verdict":
        """Answer the `graded` part of a response; a verdict ends the episode."""

    def finish(self, prompt: Prompt, state: Any, response: str, why: str) -> Verdict:
        """The verdict on an episode that cannot go on.

        Args:
            prompt: the question.
            state: the state after all steps.
            response: the `graded` part of a response that was cut and got no step; "": all
                responses got a step, and the last observation does not fit.
            why: the reason, in words.
        """
        return Verdict(reward=0.0, feedback=f"The episode has not come to its end: {why}.")

    def close(self, state: Any) -> None:  # noqa: B027 - most states hold nothing
        """Free the state's resources; called once for each episode, also after an error."""


class Verifier(Environment):
    """Judges a response: (prompt, response text) -> `Verdict`.

    Callers give the whole response, and `verify` receives the part that `graded` makes of it: the
    text behind the last end of thinking, or "" if thinking has not ended. So a draft is never an
    answer. A subclass with `strip_thinking = False` receives all of it.

    A verifier is a frozen dataclass in a module that can be imported, for prompts carry it to the
    processes that judge. It has no state, so that a verdict does not depend on earlier ones.
    """

    needs_answer: ClassVar[bool] = True

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict on the `graded` part of a response.

        It may be slow, hang, raise or exit; `VerifierPool` contains all of that.
        """

    def begin(self, prompt: Prompt) -> None:
        """Return None: a verifier has no state."""

    def step(self, prompt: Prompt, state: Any, response: str) -> Verdict:
        """Return the verdict."""
        return self.verify(prompt, response)

    def finish(self, prompt: Prompt, state: Any, response: str, why: str) -> Verdict:
        """Return the verdict on the response as it is."""
        return self.verify(prompt, response)
