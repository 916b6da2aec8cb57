"""Requests to be turned into one tool call, in ToolAlpaca's format."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from scsdpo.lab.question import LEVELS, Question
from scsdpo.types import Message
from scsdpo.verifiers import ToolCall, Verifier


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """An argument that the request gives in another unit."""

    name: str
    phrase: str
    factor: int
    """Conversion factor from the request's unit; omitting it is the pitfall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A tool: one argument to copy, four to convert."""

    name: str
    request: str
    copied: str
    phrase: str
    values: tuple[str, ...]
    slots: tuple[Slot, Slot, Slot, Slot]


CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Delhi")
PEOPLE = ("Ana", "Ben", "Eva", "Leo", "Mia", "Tom")
SAMPLES = ("blood", "soil", "water", "milk", "resin", "salt")
WEEKS = Slot(name="days", phrase="for {} weeks", factor=7)
HOURS = Slot(name="minutes", phrase="for {} hours", factor=60)
COUPLES = Slot(name="people", phrase="with {} couples", factor=2)
QUARTERS = Slot(name="cents", phrase="at {} quarters", factor=25)
DOZENS = Slot(name="pieces", phrase="in {} dozen pieces", factor=12)
YARDS = Slot(name="feet", phrase="over {} yards", factor=3)
POUNDS = Slot(name="ounces", phrase="of {} pounds", factor=16)
DAYS = Slot(name="hours", phrase="within {} days", factor=24)
TOOLS = (
    Tool(
        name="bookRoom",
        request="Book a room",
        copied="city",
        phrase="in {}",
        values=CITIES,
        slots=(WEEKS, COUPLES, QUARTERS, DAYS),
    ),
    Tool(
        name="sendParcel",
        request="Send a parcel",
        copied="to",
        phrase="to {}",
        values=PEOPLE,
        slots=(POUNDS, DAYS, QUARTERS, DOZENS),
    ),
    Tool(
        name="heatSample",
        request="Heat a sample",
        copied="sample",
        phrase="from the {}",
        values=SAMPLES,
        slots=(HOURS, POUNDS, DOZENS, YARDS),
    ),
    Tool(
        name="planTour",
        request="Plan a tour",
        copied="city",
        phrase="of {}",
        values=CITIES,
        slots=(HOURS, COUPLES, YARDS, WEEKS),
    ),
)
WORDINGS = ("", "Thought: I should call {}.\n")
"""Texts before the action."""
PROMPT = "Tools: {tools}\nQuestion: {question}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolRequest(Question):
    """A request with one argument to copy and `level` to convert."""

    tools: tuple[Tool, ...]
    """The offered tools; the first one is needed."""
    order: tuple[int, ...]
    """Order in which the tools are listed."""
    value: str
    """The argument to copy."""
    slots: tuple[tuple[Slot, int], ...]
    """The other arguments, with the request's numbers."""
    spoken: tuple[int, ...]
    """Order in which the request names the slots."""
    shape: ClassVar[str] = "tool"
    wordings: ClassVar[int] = len(WORDINGS)

    @classmethod
    def draw(cls, rng: Random, level: int) -> "ToolRequest":
        """A request with `level` arguments to convert; from the second level on, of two tools."""
        tools = tuple(rng.sample(TOOLS, 1 if level == LEVELS[0] else 2))
        slots = rng.sample(tools[0].slots, level)
        return cls(
            tools=tools,
            order=tuple(rng.sample(range(len(tools)), len(tools))),
            value=rng.choice(tools[0].values),
            slots=tuple((slot, rng.randint(2, 9)) for slot in slots),
            spoken=tuple(rng.sample(range(level), level)),
        )

    @property
    def messages(self) -> tuple[Message, ...]:
        tool, names = self.tools[0], [slot.name for slot, _ in self.slots]
        listed = [f"{tool.name}({', '.join([tool.copied, *names])})"]
        listed += [f"{other.name}({other.copied})" for other in self.tools[1:]]
        said = [self.slots[i][0].phrase.format(self.slots[i][1]) for i in self.spoken]
        text = PROMPT.format(
            tools=", ".join(listed[i] for i in self.order),
            question=" ".join([tool.request, tool.phrase.format(self.value), *said]) + ".",
        )
        return ({"role": "user", "content": text},)

    @property
    def answer(self) -> str:
        arguments: dict[str, str | int] = {self.tools[0].copied: self.value}
        arguments |= {slot.name: number * slot.factor for slot, number in self.slots}
        return json.dumps([{"Action": self.tools[0].name, "Action_Input": json.dumps(arguments)}])

    @property
    def verifier(self) -> Verifier:
        return ToolCall()

    @property
    def pitfalls(self) -> tuple[str, ...]:
        return tuple(f"{self.tools[0].name}.{slot.name}" for slot, _ in self.slots)

    def work(self, *, wording: int = 0, mistakes: Collection[int] = ()) -> list[str]:
        tool = self.tools[0]
        head = WORDINGS[wording].format(tool.name)
        parts = [f'{head}Action: {tool.name}\nAction Input: {{"{tool.copied}": "{self.value}"']
        for i, (slot, number) in enumerate(self.slots):
            parts.append(f', "{slot.name}": {number * (1 if i in mistakes else slot.factor)}')
        return [*parts, "}"]
