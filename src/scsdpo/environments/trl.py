"""Environments written for TRL's `environment_factory`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MethodType
from typing import Any

from scsdpo.environments.calling import (
    Role,
    accepted,
    answered,
    calls_something,
    schema_of,
    settled,
)
from scsdpo.prompt import Environment, Message, Observation, Prompt, ToolSchema, Verdict
from scsdpo.verifiers.function import imported

_FACTORY = "TRLEnvironment(factory={!r})"
_REWARD = "TRLEnvironment(reward={!r})"
_OWN = ("reset", "get_reward")
"""Public methods of such a class that are not tools."""


@dataclass(kw_only=True, slots=True)
class _Played:
    world: Any
    observed: str
    """The text that `reset` returned."""
    turns: int = 0
    last: str = ""
    """The last response."""


@dataclass(frozen=True, kw_only=True)
class TRLEnvironment(Environment):
    """An unchanged class for TRL's `environment_factory`.

    Each episode has a new object, made without arguments. `reset(**row)` begins the episode with
    the prompt and the further columns of the row; a text that it returns is shown after the
    question. Its public methods, with type hints and docstrings, are the tools. A response without
    calls ends the episode; then `get_reward()` gives the reward, or a reward function that TRL
    would call with `environments`. `reset`, tools and `get_reward` may be `async`.

    Args:
        factory: the class, as `module:Class`; or several by name, `{name: module:Class}`, among
            which the row's column `environment` chooses.
        reward: a reward function, as `module:function`, for classes without `get_reward`.
        max_turns: limit on the responses of an episode; the last ends it even if it has calls.
        role: role of the tools' answers; `user` for chat templates without a role for tools.
        replays: True if equal calls get equal results; see `Environment`.
        strip_thinking: read only the text after the thinking; calls inside it do not count.

    Raises:
        ValueError: if a class or function does not exist; if a class has no `reset` or no tool, or
            nothing gives a reward; if a tool does not describe its arguments; if `max_turns` < 1.

    Source:
        TRL 1.16, GRPOTrainer(environment_factory=...).
    """

    factory: str | dict[str, str]
    reward: str = ""
    max_turns: int = 16
    role: Role = "tool"
    replays: bool = True
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ValueError(f"`TRLEnvironment(max_turns=...)` must be >= 1, got {self.max_turns}")
        if not self.factory:
            raise ValueError("`TRLEnvironment(factory=...)` must name a class, got none")
        if self.reward:
            imported(self.reward, _REWARD)
        for name in self.factory.values() if isinstance(self.factory, dict) else [self.factory]:
            owner, kind = _FACTORY.format(name), imported(name, _FACTORY)
            if not callable(getattr(kind, "reset", None)):
                raise ValueError(f"`{owner}` must be a class with a method `reset`")
            if not _schemas(name):
                raise ValueError(f"`{owner}` has no public method for the policy to call")
            if not self.reward and not hasattr(kind, "get_reward"):
                raise ValueError(
                    f"`{owner}` has no method `get_reward`, so that nothing gives a reward; add "
                    "one, or name TRL's reward function as `reward: module:function`"
                )

    def prepare(self) -> None:
        """Import the classes."""
        for name in self.factory.values() if isinstance(self.factory, dict) else [self.factory]:
            imported(name, _FACTORY)

    def check(self, prompt: Prompt) -> None:
        """Raise if the row names an unknown environment."""
        self._name(prompt)

    def offered(self, prompt: Prompt) -> Sequence[ToolSchema]:
        """The schemas of the public methods."""
        return _schemas(self._name(prompt))

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """The argument `role`."""
        return (self.role,)

    def begin(self, prompt: Prompt) -> _Played:
        """A new object, reset with the row."""
        world = imported(self._name(prompt), _FACTORY)()
        observed = settled(world.reset(**accepted(world.reset, _row(prompt))))
        return _Played(world=world, observed="" if observed is None else str(observed))

    def opening(self, prompt: Prompt, state: _Played) -> tuple[Message, ...]:
        """The question, with the text that `reset` returned."""
        if not state.observed:
            return prompt.messages
        *earlier, last = prompt.messages
        glue = "\n\n" if last["content"].strip() and state.observed[:1].strip() else ""
        return (*earlier, {**last, "content": last["content"] + glue + state.observed})

    def step(self, prompt: Prompt, state: _Played, response: str) -> Observation | Verdict:
        """The tools' answers; to a response without calls, the verdict."""
        state.turns += 1
        state.last = response
        tools = _tools(state.world)
        if state.turns < self.max_turns:
            return answered(tools, prompt, response, self.role) or self._verdict(prompt, state)
        goes_on = calls_something(tools, prompt, response)
        return replace(self._verdict(prompt, state), stopped="turns" if goes_on else "")

    def finish(self, prompt: Prompt, state: _Played, response: str, why: str) -> Verdict:
        """The verdict with the reward so far."""
        state.last = response
        return self._verdict(prompt, state)

    def _verdict(self, prompt: Prompt, state: _Played) -> Verdict:
        if self.reward:
            function = imported(self.reward, _REWARD)
            said = [{"role": "assistant", "content": state.last}]
            given = {name: [value] for name, value in _row(prompt).items()}
            given |= {"prompts": [list(prompt.messages)], "completions": [said]}
            rewards = settled(
                function(**accepted(function, given | {"environments": [state.world]}))
            )
            reward = rewards[0]
        else:
            reward = settled(state.world.get_reward())
        return Verdict(reward=float(reward or 0.0), answer=state.last.strip() or None)

    def _name(self, prompt: Prompt) -> str:
        if isinstance(self.factory, str):
            return self.factory
        chosen = prompt.row.get("environment")
        if chosen not in self.factory:
            known = ", ".join(map(repr, self.factory))
            raise ValueError(
                f"`TRLEnvironment(factory=...)` has the environments {known}, and the row's "
                f"`environment` is {chosen!r}; name the column in `columns` of the source, and "
                "the class in `factory`"
            )
        return self.factory[chosen]


def _row(prompt: Prompt) -> Mapping[str, Any]:
    answer = {"answer": prompt.answer} if prompt.answer else {}
    return {"prompt": list(prompt.messages), **answer, **prompt.row}


def _tools(world: object) -> dict[str, Callable[..., Any]]:
    methods = inspect.getmembers(world, inspect.ismethod)
    return {name: each for name, each in methods if name[0] != "_" and name not in _OWN}


@lru_cache
def _schemas(name: str) -> list[ToolSchema]:
    """The tools' schemas, from the class: making an object may be slow or start something."""
    kind = imported(name, _FACTORY)
    nobody = object()
    return [
        schema_of(MethodType(function, nobody), _FACTORY.format(name))
        for own, function in inspect.getmembers(kind, inspect.isfunction)
        if own[0] != "_" and own not in _OWN
    ]
