"""Plain functions as tools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from scsdpo.environments.calling import Role, answered, calls_something, schema_of
from scsdpo.prompt import Environment, Observation, Prompt, Tool, Verdict, Verifier
from scsdpo.verifiers.function import imported

_OWNER = "Tools(tools=[{!r}])"


@dataclass(kw_only=True, slots=True)
class _Turns:
    """Responses so far that called something."""

    taken: int = 0


@dataclass(frozen=True, kw_only=True)
class Tools(Environment):
    """Python functions that the policy may call, until it answers; a verifier judges the answer.

    The chat template writes the functions into the prompt, as `get_json_schema` of transformers
    reads them: each has type hints, and a docstring with an `Args:` block. Calls are read in the
    forms of the common model families, and made in the order in which they stand; each gives a
    message. A call that cannot be read, a tool that is not there, wrong arguments and an error in
    the function give a message "Error: ...". A response without a call is the answer.

    Args:
        tools: functions, as `module:function`, with the module in the folder in which the command
            runs, or on the import path; they may be `async`.
        verifier: judges the last response.
        max_turns: responses of an episode; one that still calls a tool then is judged as answer.
        role: of the messages in which tools answer; `user` for chat templates without tools' turns.
        replays: whether equal calls get equal results; see `Environment`.
        strip_thinking: read only what stands behind the thinking; calls in it are drafts.

    Raises:
        ValueError: if a function is not there, or does not say what it takes; if `max_turns` < 1.
    """

    tools: tuple[str, ...]
    verifier: Verifier
    max_turns: int = 16
    role: Role = "tool"
    replays: bool = True
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if not self.tools:
            raise ValueError("`Tools(tools=...)` must name at least one function, got none")
        if self.max_turns < 1:
            raise ValueError(f"`Tools(max_turns=...)` must be >= 1, got {self.max_turns}")
        names = [_schema(name)["function"]["name"] for name in self.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"`Tools(tools=...)` has two functions `{min(twice)}`; rename one")

    @property
    def reads_json(self) -> bool:  # type: ignore[override]
        """As its verifier does."""
        return self.verifier.reads_json

    @property
    def needs_answer(self) -> bool:  # type: ignore[override]
        """As its verifier does."""
        return self.verifier.needs_answer

    def prepare(self) -> None:
        """Import the functions."""
        self._functions()
        self.verifier.prepare()

    def check(self, prompt: Prompt) -> None:
        """Whether the verifier can read the gold answer."""
        self.verifier.check(prompt)

    def offered(self, prompt: Prompt) -> Sequence[Tool]:
        """The functions' schemas."""
        return [_schema(name) for name in self.tools]

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """As it was told."""
        return (self.role,)

    def begin(self, prompt: Prompt) -> _Turns:
        """Functions have no state."""
        return _Turns()

    def step(self, prompt: Prompt, state: _Turns, response: str) -> Observation | Verdict:
        """What the tools answer; of a response that calls none, the verdict."""
        state.taken += 1
        functions, verify = self._functions(), self.verifier.verify
        if state.taken < self.max_turns:
            return answered(functions, prompt, response, self.role) or verify(prompt, response)
        goes_on = calls_something(functions, prompt, response)
        return replace(verify(prompt, response), stopped="turns" if goes_on else "")

    def finish(self, prompt: Prompt, state: _Turns, response: str, why: str) -> Verdict:
        """The verdict on the last response."""
        return self.verifier.verify(prompt, response)

    def _functions(self) -> dict[str, Callable[..., Any]]:
        found = [imported(name, _OWNER) for name in self.tools]
        return {function.__name__: function for function in found}


@lru_cache
def _schema(name: str) -> Tool:
    return schema_of(imported(name, _OWNER), _OWNER.format(name))
