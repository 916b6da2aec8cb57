"""Episodes in a worker process: states of environments, and their answers."""

import errno
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scsdpo.prompt import Environment, Message, Observation, Prompt, Verdict
from scsdpo.verifiers.guard import children, end_children
from scsdpo.verifiers.text import capped, valid
from scsdpo.verifiers.verify import attempted, is_number, tidy_verdict

MAX_MESSAGES = 16
"""Most messages with which an environment answers one response."""
MAX_OPENING = 400_000
"""Most characters of the messages that open an episode."""
_MAX_NAME = 200
_ANSWERING: tuple[str, ...] = ("tool", "user")
"""Roles in which an environment may answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A response for an environment, with all data to rebuild the episode's state."""

    episode: int
    act: Literal["begin", "step", "finish", "drop"]
    past: tuple[str, ...] = ()
    """Earlier responses, on which steps were taken."""
    seen: tuple[str, ...] = ()
    """`digest` of the opening, and of the observation after each of `past`."""
    response: str = ""
    why: str = ""
    """Reason why the episode must end with this response; empty: it need not."""


@dataclass(kw_only=True, slots=True)
class _Held:
    """The state of an episode in this process."""

    environment: Environment
    state: Any
    steps: int = 0
    pids: frozenset[int] = frozenset()
    """Processes that the episode has started."""


class Stage:
    """The episodes of one process.

    Args:
        max_feedback: number of characters of feedback that are kept.
        max_observation: number of characters of a message that are kept.
        alone: this process does nothing else, so every child process that appears while an
            environment acts belongs to its episode, and is ended with it.
    """

    def __init__(self, max_feedback: int, max_observation: int, *, alone: bool) -> None:
        self.max_feedback, self.max_observation = max_feedback, max_observation
        self._alone = alone
        self._held: dict[int, _Held] = {}

    def answer(self, prompt: Prompt, turn: Turn) -> Observation | Verdict:
        """The environment's observation, or the verdict that ends the episode.

        Raises:
            NoRoom: if the machine had no room for a process or memory; the state is lost.
        """
        if turn.act == "drop":
            self._close(turn.episode)
            return Verdict(reward=0.0)
        before = children() if self._alone else frozenset[int]()
        ended = True
        try:
            result: Observation | Verdict = attempted(
                type(prompt.verifier).__name__, lambda: self._act(prompt, turn), self._tidy
            )
            ended = isinstance(result, Verdict)
        finally:
            if held := self._held.get(turn.episode):
                if self._alone:
                    held.pids |= children() - before
                if ended:
                    self._close(turn.episode)
        return result

    def _act(self, prompt: Prompt, turn: Turn) -> object:
        environment = prompt.verifier
        try:
            held = self._state(prompt, turn)
            if turn.act == "begin":
                return _Opening(environment.opening(prompt, held.state))
            if turn.act == "finish":
                return environment.finish(prompt, held.state, turn.response, turn.why)
            result = environment.step(prompt, held.state, turn.response)
            held.steps += 1
            return result
        except MemoryError as error:  # other episodes in this process may hold the memory
            raise OSError(errno.ENOMEM, "not enough memory") from error

    def _state(self, prompt: Prompt, turn: Turn) -> _Held:
        """The episode's state; it is rebuilt if it is not in this process."""
        held = self._held.get(turn.episode)
        if held and held.steps == len(turn.past):
            return held
        self._close(turn.episode)
        environment = prompt.verifier
        if turn.past and not environment.replays:
            raise RuntimeError("its process was lost, and its environment does not replay turns")
        state = environment.begin(prompt)
        held = self._held[turn.episode] = _Held(environment=environment, state=state)
        if not turn.seen:
            return held
        opening = self._tidy(_Opening(environment.opening(prompt, state)))
        if not isinstance(opening, Observation) or digest(opening.messages) != turn.seen[0]:
            raise RuntimeError(
                "it begins with other messages than another episode of the same prompt: `opening` "
                "must depend on the prompt only"
            )
        for response, seen in zip(turn.past, turn.seen[1:], strict=True):
            again = self._tidy(environment.step(prompt, state, response))
            if not isinstance(again, Observation) or digest(again.messages) != seen:
                raise RuntimeError(
                    "its process was lost, and its environment answered the same responses with "
                    "other messages than before: set `replays = False`"
                )
            held.steps += 1
        return held

    def _close(self, episode: int) -> None:
        held = self._held.pop(episode, None)
        if held is None:
            return
        # The episode is over, so an error here is of no use to anyone.
        attempted("close", lambda: held.environment.close(held.state), lambda _: Verdict(reward=0))
        if held.pids:
            end_children(children() - held.pids)

    def _tidy(self, result: object) -> Observation | Verdict | None:
        if isinstance(result, Verdict):
            return tidy_verdict(result, self.max_feedback)
        opens = isinstance(result, _Opening)
        most, roles = self.max_observation, _ANSWERING
        if isinstance(result, _Opening):
            most, roles = MAX_OPENING, ("system", "assistant", *_ANSWERING)
            result = Observation(messages=result.messages)
        if not isinstance(result, Observation) or not isinstance(result.feedback, str):
            return None
        counts = (result.calls, result.failed)
        if not is_number(result.reward) or not all(isinstance(n, int) and n >= 0 for n in counts):
            return None
        messages = list(result.messages)
        if not messages or (len(messages) > MAX_MESSAGES and not opens):
            return None
        if not all(_is_message(message, roles) for message in messages):
            return None
        if opens and (
            messages[-1]["role"] != "user" or sum(len(m["content"]) for m in messages) > most
        ):
            return None
        return Observation(
            messages=tuple(
                {
                    key: capped(text, most) if key == "content" else capped(text, _MAX_NAME)
                    for key, text in message.items()
                }
                for message in messages
            ),
            feedback=capped(result.feedback, self.max_feedback),
            reward=float(result.reward),
            calls=result.calls,
            failed=result.failed,
        )


@dataclass(frozen=True, slots=True)
class _Opening:
    messages: tuple[Message, ...]


def _is_message(message: object, roles: Sequence[str]) -> bool:
    return (
        isinstance(message, dict)
        and {"role", "content"} <= message.keys() <= {"role", "content", "name"}
        and all(isinstance(text, str) for text in message.values())
        and message["role"] in roles
    )


def digest(messages: Sequence[Message]) -> str:
    """A digest that is equal for equal messages only."""
    said = json.dumps([sorted(message.items()) for message in messages])
    return hashlib.blake2b(valid(said).encode(), digest_size=16).hexdigest()
