"""Plain functions as tools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from scsdpo.environments.calling import Role, answered, calls_something, schema_of
from scsdpo.prompt import Environment, Observation, Prompt, ToolSchema, Verdict, Verifier
from scsdpo.verifiers.function import imported

_OWNER = "Tools(tools=[{!r}])"


@dataclass(kw_only=True, slots=True)
class _Turns:
    """Number of responses so far that called functions."""

    taken: int = 0


@dataclass(frozen=True, kw_only=True)
class Tools(Environment):
    """Python functions that the policy may call before it answers; a verifier judges the answer.

    The chat template writes the functions into the prompt, as described by transformers'
    `get_json_schema`: each needs type hints, and a docstring with an `Args:` block. Calls are read
    in the forms of the common model families and made in order; each gives a message. An unreadable
    call, an unknown tool, wrong arguments and an error in the function give a message "Error: ...".
    A response without a call is the answer.

    Args:
        tools: functions, as `module:function`; the module is in the folder in which the command
            runs, or on the import path. They may be `async`.
        verifier: judges the last response.
        max_turns: limit on the responses of an episode; the last is judged even if it has calls.
        role: role of the tools' answers; `user` for chat templates without a role for tools.
        replays: True if equal calls get equal results; see `Environment`.
        strip_thinking: read only the text after the thinking; calls inside it do not count.

    Raises:
        ValueError: if a function does not exist or does not describe its arguments, or if
            `max_turns` < 1.
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
        """True if its verifier reads JSON."""
        return self.verifier.reads_json

    @property
    def needs_answer(self) -> bool:  # type: ignore[override]
        """True if its verifier needs an answer."""
        return self.verifier.needs_answer

    def prepare(self) -> None:
        """Import the functions."""
        self._functions()
        self.verifier.prepare()

    def check(self, prompt: Prompt) -> None:
        """Raise if the verifier cannot read the gold answer."""
        self.verifier.check(prompt)

    def offered(self, prompt: Prompt) -> Sequence[ToolSchema]:
        """The functions' schemas."""
        return [_schema(name) for name in self.tools]

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """The argument `role`."""
        return (self.role,)

    def begin(self, prompt: Prompt) -> _Turns:
        """A counter of turns; the functions have no state."""
        return _Turns()

    def step(self, prompt: Prompt, state: _Turns, response: str) -> Observation | Verdict:
        """The tools' answers; to a response without calls, the verdict."""
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
def _schema(name: str) -> ToolSchema:
    return schema_of(imported(name, _OWNER), _OWNER.format(name))
