"""Questions, verdicts and who gives them, without torch: the processes that judge responses import
this alone.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, ClassVar

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
    verifier: "Verifier"
    """Turns a response to this prompt into a `Verdict`."""
    answer: str
    """The gold answer in the form that `verifier` compares with; never shown to the policy."""
    tools: tuple[Tool, ...] = ()
    """Functions that the policy may call; the chat template writes them into the prompt."""
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


def _behind_thinking(verify: Callable[[Any, Prompt, str], Verdict]) -> Any:
    @wraps(verify)
    def verify_graded(self: "Verifier", prompt: Prompt, response: str) -> Verdict:
        graded = self.graded(prompt, response)
        # Nothing is open before what is graded, for a `verify` that calls another one.
        return verify(self, replace(prompt, thinking="") if prompt.thinking else prompt, graded)

    return verify_graded


class Verifier(ABC):
    """Judges a response: (prompt, response text) -> `Verdict`.

    Whoever calls `verify` gives the whole response, and `verify` receives what is `graded` of it:
    the text behind the last end of thinking, or "" where thinking has not ended. So a draft is
    never an answer. This holds for every subclass; one with `strip_thinking = False` receives all.

    A verifier is a frozen dataclass in a module that can be imported: prompts carry it to the
    processes that judge. It has no state, so that its verdicts do not depend on what was judged
    before.
    """

    reads_json: ClassVar[bool] = False
    """Whether gold answers are JSON: then a list, or a value with columns of its own, is one."""
    strip_thinking: bool = True
    """Whether `verify` receives only what stands behind the thinking (`scsdpo.thinking`)."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "verify" in vars(cls):
            cls.verify = _behind_thinking(cls.verify)  # type: ignore[method-assign]

    def graded(self, prompt: Prompt, response: str) -> str:
        """What `verify` receives of a response."""
        return behind_thinking(prompt.thinking + response) if self.strip_thinking else response

    def prepare(self) -> None:  # noqa: B027
        """Whatever takes long the first time, such as imports; off the clock of any verdict.

        Called in each process that judges, at least once before `verify`. What it raises ends the
        run: a verifier that cannot work at all is a mistake in the configuration. Processes that
        help it start here: what `verify` leaves behind is ended with its verdict.
        """

    def check(self, prompt: Prompt) -> None:  # noqa: B027
        """Whether `verify` can read the gold answer of `prompt`; without this, any.

        Called in the training process, before training.

        Raises:
            ValueError: if it cannot, so that no response to the prompt would ever be right.
        """

    def written(self, prompt: Prompt) -> str:
        """A response that gives the gold answer in the form that the task asks for.

        Before training it is judged, and a gold answer that is judged wrong is refused. Empty:
        this verifier cannot say, and nothing is proved.
        """
        return ""

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict on what is `graded` of a response. It may be slow, hang, raise or exit:
        `VerifierPool` contains all of that.
        """
