"""The lab's questions as a source of prompts."""

from collections.abc import Sequence
from random import Random
from typing import Literal

from scsdpo.data._base import Source
from scsdpo.lab.question import LEVELS, Question
from scsdpo.lab.science import Science
from scsdpo.lab.toolcall import ToolRequest
from scsdpo.types import Prompt, stable_hash

SHAPES: dict[str, type[Science] | type[ToolRequest]] = {
    Science.shape: Science,
    ToolRequest.shape: ToolRequest,
}
VAL_SHARE = 8
"""One question in this many belongs to validation."""


class LabTasks(Source):
    """Procedural, verifiable questions, endless and without files.

    Question i depends on (split, seed, i) only. Levels and shapes alternate, so that any stretch of
    questions is balanced. The hash of its text decides whether a question belongs to validation;
    the other split draws again, so for any seeds no question is in both.

    Args:
        split: "train" or "val".
        seed: another seed gives other questions.
        size: nominal length; must be >= 1. Indices beyond it work too.
        levels: difficulties to draw, of 1, 2, 3 and 4: the steps or arguments of a question.
        shapes: kinds of question to draw, of "science" and "tool".

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        split: Literal["train", "val"],
        *,
        seed: int = 0,
        size: int = 100_000,
        levels: Sequence[int] = LEVELS,
        shapes: Sequence[str] = tuple(SHAPES),
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"`LabTasks(split=...)` must be 'train' or 'val', got {split!r}")
        if size < 1:
            raise ValueError(f"`LabTasks(size=...)` must be >= 1, got {size}")
        if not levels or not set(levels) <= set(LEVELS):
            raise ValueError(f"`LabTasks(levels=...)` must be of {list(LEVELS)}, got {levels}")
        if not shapes or not set(shapes) <= set(SHAPES):
            raise ValueError(f"`LabTasks(shapes=...)` must be of {list(SHAPES)}, got {shapes}")
        self.split, self.seed, self.size = split, seed, size
        self.levels, self.shapes = tuple(levels), tuple(shapes)

    def __len__(self) -> int:
        return self.size

    def question(self, index: int) -> Question:
        """The question at `index`, which can also write its responses."""
        level = self.levels[index % len(self.levels)]
        shape = self.shapes[index // len(self.levels) % len(self.shapes)]
        rng = Random(stable_hash("scsdpo.lab", self.split, self.seed, index))
        while True:
            question = SHAPES[shape].draw(rng, level)
            held_out = stable_hash(question.messages[-1]["content"]) % VAL_SHARE == 0
            if held_out == (self.split == "val"):
                return question

    def __getitem__(self, index: int) -> Prompt:
        question = self.question(index)
        return Prompt(
            key=f"{self.name}/{self.split}/{question.shape}/{self.seed}/{index}",
            messages=question.messages,
            verifier=question.verifier,
            answer=question.answer,
            category=f"level{self.levels[index % len(self.levels)]}",
        )

    @property
    def name(self) -> str:
        """`lab`, or `lab-SHAPE` if there is one shape only."""
        return "lab" if len(self.shapes) > 1 else f"lab-{self.shapes[0]}"
