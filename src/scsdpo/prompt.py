"""Questions, verdicts and who gives them, without torch: the processes that judge responses import
this alone.
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
Tool = dict[str, Any]
"""One function that the policy may call, `{"type": "function", "function": {"name": ...,
"description": ..., "parameters": <JSON schema>}}`, as chat templates take it."""


def stable_hash(*parts: object) -> int:
    """A 63-bit hash of `parts` that is the same in every process (unlike `hash`)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """One question, as a data source yields it."""

    key: str
    """Stable identity of the question: the same after a restart, on every rank, in every order."""
    messages: tuple[Message, ...]
    """Chat turns; the last one is the user's."""
    verifier: "Environment"
    """Turns responses to this prompt into a `Verdict`: a `Verifier`, after one turn; another
    `Environment`, after several."""
    answer: str
    """The gold answer in the form that `verifier` compares with; never shown to the policy."""
    tools: tuple[Tool, ...] = ()
    """Functions that the policy may call; the chat template writes them into the prompt. Left
    empty: those that the environment offers."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of its row, which the environment reads."""
    category: str = ""
    """Stratum whose validation accuracy is reported on its own (a difficulty, a domain)."""
    stop: tuple[str, ...] = ()
    """Strings that end a response to this prompt, beside those of `Sampling.stop`."""
    response_template: Mapping[str, Any] = field(default_factory=dict)
    """How the tokenizer reads its model's responses (`parse_response` of transformers); empty: it
    does not say."""
    ids: tuple[int, ...] = ()
    """The rendered prompt, generation header included; empty until the data module rendered it."""
    copy: int = 0
    """How often the same question stands before it in the training batch, over all ranks, or in the
    validation: its response i is drawn, and recorded, as response copy G + i to the question."""
    thinking: str = ""
    """Tags of thinking that the rendered prompt leaves open, such as <think>: the response begins
    with thinking."""

    def __post_init__(self) -> None:
        # Here, and not in each source: a source of the user's own must not forget them.
        if not self.tools and isinstance(self.verifier, Environment):
            object.__setattr__(self, "tools", tuple(self.verifier.offered(self)))

    @property
    def has_turns(self) -> bool:
        """Whether the environment may answer a response, so that another one follows."""
        return isinstance(self.verifier, Environment) and not isinstance(self.verifier, Verifier)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What the world answers to a response that does not end the episode."""

    messages: tuple[Message, ...]
    """Chat turns in the roles `tool` (with a `name`) or `user`; at least one."""
    feedback: str = ""
    """What was wrong with the response, in words that the teacher may be shown and the policy does
    not see; empty: nothing to say."""
    reward: float = 0.0
    """What the turn earned, for credit by turn (`TurnRelative`). The reward of the episode is its
    verdict's alone, whatever its turns earned."""
    calls: int = 0
    """Calls of tools in the response, for figures."""
    failed: int = 0
    """How many of them could not be read or made, or raised."""

    @classmethod
    def said(cls, text: str, *, feedback: str = "", reward: float = 0.0) -> "Observation":
        """One turn of the user's."""
        said = {"role": "user", "content": text}
        return cls(messages=(said,), feedback=feedback, reward=reward)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one side said in a turn of an episode."""

    role: str
    """`assistant`: the policy; otherwise the world: `tool`, `user`."""
    text: str
    name: str = ""
    """The tool that answered."""
    feedback: str = ""
    """On the response before it: `Observation.feedback`."""
    reward: float = 0.0
    """That the response before it earned: `Observation.reward`."""
    calls: int = 0
    """In the response before it: `Observation.calls`."""
    failed: int = 0
    """Of these calls: `Observation.failed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """What was said in a rollout of several turns, and what came of it."""

    parts: tuple[Part, ...] = ()
    """In order; none: a rollout of one turn."""
    verdict: "Verdict | None" = None
    """The environment's; None: the verifier has not been asked yet."""

    @property
    def turns(self) -> int:
        """Responses of the policy."""
        return sum(part.role == "assistant" for part in self.parts) or 1

    @property
    def rewards(self) -> tuple[float, ...]:
        """What each turn earned by its observation; the verdict's reward is not among them."""
        earned: list[float] = []
        for part in self.parts:
            if part.role == "assistant":
                earned.append(0.0)
            else:
                earned[-1] += part.reward
        return tuple(earned)

    def transcript(self, change: Callable[[str], str] = str) -> str:
        """All of it as one text.

        Args:
            change: of what the policy said in a turn, such as to leave out its thinking.
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
        """What the environment said of each turn, and of the whole."""
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
    """What a verifier says of one response."""

    reward: float
    """In [0, 1] for the tasks shipped here; 1 is right."""
    answer: str | None = None
    """The extracted answer in canonical spelling, for majority votes; None: there was none."""
    feedback: str = ""
    """What is wrong, in words that the teacher may be shown; empty: nothing to say."""
    error: str = ""
    """Why the verifier itself failed; counted and logged, never a silent zero."""
    earned: float = 0.0
    """How much of `reward` the observations of earlier turns have given already
    (`Observation.reward`). Credit by turn gives the last turn the rest: all of it where turns earn
    something beside the episode's reward, and nothing but its own share where that is their sum."""
    stopped: Literal["", "turns", "time"] = ""
    """What ran out before the policy had done, if anything: the turns that the environment gives,
    or the time of a turn or of the episode."""


def _behind_thinking(act: Callable[..., Any], place: int) -> Any:
    """`verify`, `step` or `finish`; what is `graded` of the response stands in its place."""

    @wraps(act)
    def graded_act(self: "Environment", prompt: Prompt, *given: Any, **named: Any) -> Any:
        # Nothing is open before what is graded, for an `act` that calls another one.
        bare = replace(prompt, thinking="") if prompt.thinking else prompt
        if "response" in named:
            named["response"] = self.graded(prompt, named["response"])
            return act(self, bare, *given, **named)
        response = self.graded(prompt, given[place])
        return act(self, bare, *given[:place], response, *given[place + 1 :], **named)

    return graded_act


_RESPONSES = {"verify": 0, "step": 1, "finish": 1}
"""Where methods of an environment have the response, behind the prompt."""


class Environment(ABC):
    """A world that answers responses: games, tools, code with tests.

    From a prompt comes a state (`begin`); from a response the next `Observation`, or the end, a
    `Verdict` (`step`). A `Verifier` is an environment that ends after one turn.

    An environment is a frozen dataclass in a module that can be imported: prompts carry it to the
    processes that judge. What belongs to an episode stands in its state, which lives in one of
    them and never leaves it. `step` may be slow, hang, raise or exit: that costs its own episode.
    Where a process is lost, the episode goes on in another one, in which its responses are given to
    a new state once more; so equal responses must be answered alike, and one that cannot do that
    sets `replays = False` and gets processes of its own, one an episode.

    `step` and `finish` receive what is `graded` of a response: the text behind the last end of
    thinking, or "" where thinking has not ended.
    """

    reads_json: ClassVar[bool] = False
    """Whether gold answers are JSON: then a list, or a value with columns of its own, is one."""
    needs_answer: ClassVar[bool] = False
    """Whether it compares with a gold answer, so that rows without one are refused."""
    strip_thinking: bool = True
    """Whether it receives only what stands behind the thinking (`scsdpo.thinking`)."""
    replays: bool = True
    """Whether equal responses get equal observations, in whichever process."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, place in _RESPONSES.items():
            if name in vars(cls):
                setattr(cls, name, _behind_thinking(vars(cls)[name], place))

    def graded(self, prompt: Prompt, response: str) -> str:
        """What `step` and `finish` receive of a response."""
        return behind_thinking(prompt.thinking + response) if self.strip_thinking else response

    def prepare(self) -> None:  # noqa: B027
        """Whatever takes long the first time, such as imports; off the clock of any turn.

        Called in each process that judges, at least once before anything else. What it raises ends
        the run: an environment that cannot work at all is a mistake in the configuration. Processes
        that help it start here: what a verdict leaves behind is ended with it.
        """

    def check(self, prompt: Prompt) -> None:  # noqa: B027
        """Whether it can work with `prompt`: its gold answer, its row; without this, with any.

        Called in the training process, before training.

        Raises:
            ValueError: if it cannot, so that no response to the prompt would ever be right.
        """

    def written(self, prompt: Prompt) -> str:
        """A response that gives the gold answer in the form that the task asks for.

        Before training it is judged, and a gold answer that is judged wrong is refused. Empty:
        this environment cannot say, and nothing is proved.
        """
        return ""

    def offered(self, prompt: Prompt) -> Sequence[Tool]:
        """Functions that the policy may call in an episode of `prompt`."""
        return ()

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """In which roles it answers; the chat template must have such turns."""
        return ("tool",) if self.offered(prompt) else ("user",)

    @abstractmethod
    def begin(self, prompt: Prompt) -> Any:
        """The state of a new episode."""

    def opening(self, prompt: Prompt, state: Any) -> tuple[Message, ...]:
        """The chat turns that the policy is asked; without this, those of the prompt.

        Equal for all episodes of a prompt: they are the question.
        """
        return prompt.messages

    @abstractmethod
    def step(self, prompt: Prompt, state: Any, response: str) -> "Observation | Verdict":
        """What the world answers to what is `graded` of a response; a verdict ends the episode."""

    def finish(self, prompt: Prompt, state: Any, response: str, why: str) -> Verdict:
        """The verdict on an episode that cannot go on.

        Args:
            prompt: the question.
            state: after all steps so far.
            response: what is `graded` of a response that was cut, on which no step was taken; "":
                all were, and the last observation has no room.
            why: in words.
        """
        return Verdict(reward=0.0, feedback=f"The episode has not come to its end: {why}.")

    def close(self, state: Any) -> None:  # noqa: B027 - most states hold nothing
        """Give back what the state holds; called once, whatever happened."""


class Verifier(Environment):
    """Judges a response: (prompt, response text) -> `Verdict`.

    Whoever calls `verify` gives the whole response, and `verify` receives what is `graded` of it:
    the text behind the last end of thinking, or "" where thinking has not ended. So a draft is
    never an answer. This holds for every subclass; one with `strip_thinking = False` receives all.

    A verifier is a frozen dataclass in a module that can be imported: prompts carry it to the
    processes that judge. It has no state, so that its verdicts do not depend on what was judged
    before.
    """

    needs_answer: ClassVar[bool] = True

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict on what is `graded` of a response. It may be slow, hang, raise or exit:
        `VerifierPool` contains all of that.
        """

    def begin(self, prompt: Prompt) -> None:
        """Nothing is to be remembered."""

    def step(self, prompt: Prompt, state: Any, response: str) -> Verdict:
        """The verdict."""
        return self.verify(prompt, response)

    def finish(self, prompt: Prompt, state: Any, response: str, why: str) -> Verdict:
        """The verdict on what was said."""
        return self.verify(prompt, response)
