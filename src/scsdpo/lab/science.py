"""Short science questions: a first quantity from two numbers, then gains and losses."""

from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from scsdpo.lab.question import LEVELS, Question
from scsdpo.types import Message
from scsdpo.verifiers import ExactMatch, Verifier


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """One kind of story; sentences hold {noun}, {a}, {b} and {c}."""

    name: str
    nouns: tuple[str, ...]
    start: str
    operator: str
    gain: str
    loss: str
    ask: str


TOPICS = (
    Topic(
        name="motion",
        nouns=("train", "cart", "probe", "rocket"),
        start="A {noun} moves at {a} m/s for {b} s.",
        operator="*",
        gain="It goes {c} m further.",
        loss="It goes {c} m back.",
        ask="How many m from its start is it?",
    ),
    Topic(
        name="dose",
        nouns=("dog", "cat", "horse", "patient"),
        start="A {noun} of {a} kg gets {b} mg/kg of a drug.",
        operator="*",
        gain="It gets {c} mg more.",
        loss="It breaks down {c} mg.",
        ask="How many mg are left?",
    ),
    Topic(
        name="density",
        nouns=("oil", "acid", "syrup", "mercury"),
        start="A flask holds {a} ml of {noun} at {b} g/ml.",
        operator="*",
        gain="We pour in {c} g.",
        loss="We pour out {c} g.",
        ask="How many g does it hold?",
    ),
    Topic(
        name="charge",
        nouns=("wire", "coil", "cable", "battery"),
        start="A {noun} carries {a} A for {b} s.",
        operator="*",
        gain="It carries {c} C more.",
        loss="It leaks {c} C.",
        ask="How many C pass in all?",
    ),
    Topic(
        name="culture",
        nouns=("yeast", "algae", "spores", "cells"),
        start="There are {a} dishes with {b} {noun} each.",
        operator="*",
        gain="Then {c} are born.",
        loss="Then {c} die.",
        ask="How many are alive?",
    ),
    Topic(
        name="heat",
        nouns=("water", "gas", "metal", "steam"),
        start="Some {noun} at {a} K gains {b} K.",
        operator="+",
        gain="It warms by {c} K.",
        loss="It cools by {c} K.",
        ask="What is its temperature in K?",
    ),
    Topic(
        name="decay",
        nouns=("radium", "iodine", "carbon", "cobalt"),
        start="Of {a} g of {noun}, {b} g decay.",
        operator="-",
        gain="We add {c} g.",
        loss="We remove {c} g.",
        ask="How many g remain?",
    ),
)

INSTRUCTION = "Please reason step by step."
MISTAKEN = {"*": "+", "+": "*", "-": "+"}, {"+": "-", "-": "+"}
"""The operator that a beginner mistakes for the right one, in the first step and in later ones."""
WORDINGS = (("", "; ", ""), ("First ", ", then ", "."), ("We get ", ". Next, ", "."))
"""Opening, joint and end of the reasoning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Science(Question):
    """A story of `level` arithmetic steps, each on the result of the one before."""

    topic: Topic
    noun: str
    first: int
    steps: tuple[tuple[str, int], ...]
    """Operator and second operand of each step."""
    shape: ClassVar[str] = "science"
    wordings: ClassVar[int] = len(WORDINGS)

    @classmethod
    def draw(cls, rng: Random, level: int) -> "Science":
        """A question of `level` steps; at the top level its first number has two digits."""
        topic = rng.choice(TOPICS)
        big = level == LEVELS[-1] or topic.operator == "-"
        value = first = rng.randint(11, 19) if big else rng.randint(2, 9)
        steps: list[tuple[str, int]] = []
        for i in range(level):
            operand = rng.randint(2, 19) if i else rng.randint(3, 9)
            operator = (rng.choice("+-") if value > operand else "+") if i else topic.operator
            steps.append((operator, operand))
            value = _apply(operator, value, operand)
        return cls(topic=topic, noun=rng.choice(topic.nouns), first=first, steps=tuple(steps))

    @property
    def messages(self) -> tuple[Message, ...]:
        topic, (_, second) = self.topic, self.steps[0]
        sentences = [topic.start.format(noun=self.noun, a=self.first, b=second)]
        for operator, operand in self.steps[1:]:
            sentences.append((topic.gain if operator == "+" else topic.loss).format(c=operand))
        text = " ".join([*sentences, topic.ask])
        return ({"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text})

    @property
    def answer(self) -> str:
        value = self.first
        for operator, operand in self.steps:
            value = _apply(operator, value, operand)
        return str(value)

    @property
    def verifier(self) -> Verifier:
        return ExactMatch()

    @property
    def pitfalls(self) -> tuple[str, ...]:
        return tuple(f"{self.topic.name}{operator}" for operator, _ in self.steps)

    def work(self, *, wording: int = 0, mistakes: Collection[int] = ()) -> list[str]:
        opening, joint, end = WORDINGS[wording]
        parts, value = [f"<reasoning>{opening}"], self.first
        for i, (right, operand) in enumerate(self.steps):
            operator = MISTAKEN[i > 0][right] if i in mistakes else right
            result = _apply(operator, value, operand)
            parts.append(f"{joint if i else ''}{value}{operator}{operand}={result}")
            value = result
        return [*parts, f"{end}</reasoning>\n<answer>{value}</answer>"]


def _apply(operator: str, left: int, right: int) -> int:
    return {"*": left * right, "+": left + right, "-": left - right}[operator]
