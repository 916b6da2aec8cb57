"""Environments written for skyrl-gym."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scsdpo.environments.calling import accepted
from scsdpo.prompt import Environment, Message, Observation, Prompt, Verdict
from scsdpo.verifiers.function import imported

_FACTORY = "SkyRLEnvironment(factory={!r})"


@dataclass(kw_only=True, slots=True)
class _Played:
    world: Any
    messages: tuple[Message, ...]
    reward: float = 0.0
    """Sum of the steps' rewards."""


@dataclass(frozen=True, kw_only=True)
class SkyRLEnvironment(Environment):
    """An environment with skyrl-gym's interface: `init`, `step(action)` and `close`.

    `init(messages)` returns the messages that the policy sees first; `step(response)` returns
    `observations`, `reward` and `done`. An episode's reward is the sum over its steps, and each
    turn gets its step's reward.

    Args:
        factory: function or class that makes an environment, as `module:function` or
            `module:Class`; for the package's own environments `skyrl_gym:make`.
        arguments: keyword arguments of the factory, such as `{id: gsm8k}`; the further columns of
            the row are passed as `extras`, if it takes them.
        replays: True if equal responses get equal observations; see `Environment`.
        strip_thinking: give `step` only the text after the thinking; these environments search the
            whole response for their tags.

    Raises:
        ValueError: if the factory does not exist.

    Source:
        skyrl-gym 0.4.0, `skyrl_gym.Env` and `BaseTextEnv`.
    """

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    replays: bool = True
    strip_thinking: bool = False

    def __post_init__(self) -> None:
        imported(self.factory, _FACTORY)

    def prepare(self) -> None:
        """Import the factory."""
        imported(self.factory, _FACTORY)

    def begin(self, prompt: Prompt) -> _Played:
        """A new environment, initialised with the question."""
        make = imported(self.factory, _FACTORY)
        extras: Mapping[str, Any] = {"extras": dict(prompt.row)}
        world = make(**self.arguments, **accepted(make, extras))
        messages, _ = world.init([dict(message) for message in prompt.messages])
        return _Played(world=world, messages=tuple(_turn(message) for message in messages))

    def opening(self, prompt: Prompt, state: _Played) -> tuple[Message, ...]:
        """The messages that `init` returned."""
        return state.messages

    def step(self, prompt: Prompt, state: _Played, response: str) -> Observation | Verdict:
        """The observations of `step`; the verdict at `done`, or if nothing was observed."""
        output = state.world.step(response)
        before, reward = state.reward, float(output.get("reward") or 0.0)
        state.reward += reward
        observed = tuple(_turn(message) for message in output.get("observations") or ())
        if output.get("done") or not observed:
            answer = response.strip() or None
            return Verdict(reward=state.reward, answer=answer, earned=before)
        return Observation(messages=observed, reward=reward)

    def finish(self, prompt: Prompt, state: _Played, response: str, why: str) -> Verdict:
        """The reward so far."""
        said = f"The episode did not end: {why}."
        return Verdict(reward=state.reward, feedback=said, earned=state.reward)

    def close(self, state: _Played) -> None:
        """Call the environment's `close`."""
        state.world.close()


def _turn(message: Mapping[str, Any]) -> Message:
    return {"role": message["role"], "content": message["content"]}
