"""Environments that go well and badly, in a module that worker processes can import."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scsdpo.prompt import Environment, Observation, Verdict


@dataclass(frozen=True, kw_only=True)
class Counting(Environment):
    """Says how often it was answered, and ends after `turns` responses."""

    turns: int = 3
    folder: str = ""
    """Where each process that steps leaves its pid."""

    def begin(self, prompt):
        return {"steps": 0}

    def step(self, prompt, state, response):
        state["steps"] += 1
        self.misbehave(prompt, state, response)
        if self.folder:
            (Path(self.folder) / f"{prompt.key}-{state['steps']}-{os.getpid()}").touch()
        if state["steps"] == self.turns:
            return Verdict(reward=1.0, answer=response, feedback="It is over.")
        feedback = f"step {state['steps']}"
        return Observation.said(f"{state['steps']} steps", feedback=feedback, reward=0.5)

    def misbehave(self, prompt, state, response):
        pass


@dataclass(frozen=True, kw_only=True)
class Bad(Counting):
    """Does what the response says."""

    def misbehave(self, prompt, state, response):
        if response == "hang":
            time.sleep(600)
        elif response == "raise":
            raise KeyError("no such thing")
        elif response == "exit":
            sys.exit(3)
        elif response == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif response == "die once":
            mark = Path(self.folder) / "died"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        elif response == "nonsense":
            raise SystemExit
        elif response == "leak":
            state["kept"] = bytearray(10**10)
        elif response == "start":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (Path(self.folder) / f"child-{child.pid}").touch()


@dataclass(frozen=True, kw_only=True)
class Returns(Counting):
    """Returns what no environment may."""

    def step(self, prompt, state, response):
        return {
            "text": "a text",
            "role": Observation(messages=({"role": "assistant", "content": "I"},)),
            "empty": Observation(messages=()),
            "nan": Verdict(reward=float("nan")),
            "earned": Verdict(reward=1.0, earned=float("inf")),
            "reward": Observation.said("a", reward=float("nan")),
            "calls": Observation(messages=({"role": "user", "content": "a"},), calls=-1),
            "stopped": Verdict(reward=1.0, stopped="words"),
            "long": Observation.said("x" * 100_000),
        }[response]


@dataclass(frozen=True, kw_only=True)
class Drifting(Bad):
    """Answers otherwise in another process."""

    replays: bool = True

    def step(self, prompt, state, response):
        answer = super().step(prompt, state, response)
        if isinstance(answer, Verdict):
            return answer
        return Observation.said(f"process {os.getpid()}")


@dataclass(frozen=True, kw_only=True)
class Opening(Counting):
    """Opens with a word of its own; by chance if `random`."""

    random: bool = False
    fails: bool = False

    def begin(self, prompt):
        if self.fails:
            raise OSError("no door")
        return {"steps": 0, "word": str(random.random()) if self.random else "door"}

    def opening(self, prompt, state):
        (last,) = prompt.messages
        return ({**last, "content": f"{last['content']} You see a {state['word']}."},)


@dataclass(frozen=True, kw_only=True)
class Echo(Environment):
    """Answers with something that depends on all that was said; ends after `turns`."""

    turns: int = 3
    words: int = 3

    def begin(self, prompt):
        return []

    def step(self, prompt, state, response):
        state.append(response)
        if len(state) == self.turns:
            return Verdict(reward=float(len("".join(state)) % 2))
        said = "".join(state)
        return Observation.said(" ".join(str((len(said) * 7 + i) % 10) for i in range(self.words)))


@dataclass(frozen=True, kw_only=True)
class Slow(Echo):
    """Takes longer for some prompts."""

    def step(self, prompt, state, response):
        if prompt.key == "slow":
            time.sleep(0.15)
        return super().step(prompt, state, response)


# --- as users have them ---------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first one.
        b: the second one.
    """
    return a + b


async def lookup(city: str) -> dict:
    """Look up a city.

    Args:
        city: its name.
    """
    return {"Oslo": {"degrees": 12}}[city]


def untyped(a):
    """Has no types."""


class Vault:
    """As TRL takes it."""

    def reset(self, secret: int = 0, **row) -> str | None:
        self.secret, self.tries, self.opened = secret, 0, False
        return f"The vault has {secret % 3 + 1} digits."

    def turn(self, number: int) -> str:
        """Turn the wheel.

        Args:
            number: to which number.
        """
        self.tries += 1
        self.opened = number == self.secret
        return "It opens." if self.opened else "higher" if number < self.secret else "lower"

    async def listen(self) -> str:
        """Listen at the door."""
        return "Tick."

    def _hidden(self):
        raise AssertionError

    async def get_reward(self) -> float:
        return self.opened / self.tries if self.tries else 0.0


class Lamp:
    """As TRL takes it, with a reward function beside it."""

    def reset(self, **row):
        self.on = False

    def press(self) -> str:
        """Press the switch."""
        self.on = not self.on
        return f"on: {self.on}"


def lit(environments, completions, **row):
    return [float(each.on) for each in environments]


class Sums:
    """As skyrl-gym has it."""

    def __init__(self, most: int, extras: dict):
        self.most, self.wanted, self.closed = most, extras["wanted"], False

    def init(self, prompt):
        system = {"role": "system", "content": f"At most {self.most} turns."}
        self.turns = 0
        return [system, *prompt], {}

    def step(self, action: str):
        self.turns += 1
        right = action.strip() == self.wanted
        done = right or self.turns == self.most
        said = [] if done else [{"role": "user", "content": "Try again."}]
        return {"observations": said, "reward": 0.5 * right + 0.1, "done": done, "metadata": {}}

    def close(self):
        self.closed = True
