"""Small sums and products in words, as questions for a small pretrained language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from scsdpo.data._base import Source
from scsdpo.types import Prompt, stable_hash
from scsdpo.verifiers import Regex

WORDINGS: dict[str, tuple[str, ...]] = {
    "sum": (
        "What is {a} + {b}?",
        "Compute {a} plus {b}.",
        "Tom has {a} apples and gets {b} more. How many apples does he have now?",
        "Add {a} and {b}. What is the result?",
    ),
    "product": (
        "What is {a} x {b}?",
        "Compute {a} times {b}.",
        "There are {a} boxes with {b} apples in each. How many apples are there in all?",
        "Multiply {a} by {b}. What is the result?",
    ),
}
"""Wordings of the question for each operation."""
LAST_NUMBER = Regex(pattern=r"(-?[0-9]+(?:\.[0-9]*[1-9])?)(?:\.?0*)[^0-9]*$")
"""Right iff the last number of the response is the answer: `56`, `= 56.`, `56.0`; not `56.5`."""
HELD_OUT = 5
"""One pair of numbers in this many belongs to validation."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    operation: str
    a: int
    b: int
    wording: int


class Arithmetic(Source):
    """Sums and products of two numbers from 1 to `most`, each asked in one of four wordings.

    A response is right iff its last number is the answer; its form is free. Every operation and
    ordered pair of numbers appears once, with a wording that depends on `seed`, so the set is
    finite and needs no files. A fifth of the unordered pairs, by a hash of operation, numbers and
    seed, belong to validation: a pair and its mirror image are in the same split. With the defaults
    there are 232 training and 56 validation questions.

    Args:
        split: "train" or "val".
        seed: another seed gives other wordings and another split.
        most: largest number, >= 2.
        operations: of "sum" and "product".

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        split: Literal["train", "val"],
        *,
        seed: int = 0,
        most: int = 12,
        operations: Sequence[str] = tuple(WORDINGS),
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"`Arithmetic(split=...)` must be 'train' or 'val', got {split!r}")
        if most < 2:
            raise ValueError(f"`Arithmetic(most=...)` must be >= 2, got {most}")
        if not operations or not set(operations) <= set(WORDINGS):
            raise ValueError(
                f"`Arithmetic(operations=...)` must be of {list(WORDINGS)}, got {list(operations)}"
            )
        self.split, self.seed, self.most = split, seed, most
        self.operations = tuple(operations)

    @property
    def name(self) -> str:
        """Always `arithmetic`."""
        return "arithmetic"

    @cached_property
    def _items(self) -> tuple[_Item, ...]:
        numbers = range(1, self.most + 1)
        every = [
            (operation, a, b) for operation, a, b in product(self.operations, numbers, numbers)
        ]
        pairs = sorted(
            {(operation, min(a, b), max(a, b)) for operation, a, b in every},
            key=lambda pair: stable_hash("scsdpo.arithmetic", "split", self.seed, *pair),
        )
        held_out = set(pairs[: max(len(pairs) // HELD_OUT, 1)])
        return tuple(
            _Item(
                operation=operation,
                a=a,
                b=b,
                wording=stable_hash("scsdpo.arithmetic", "wording", self.seed, operation, a, b)
                % len(WORDINGS[operation]),
            )
            for operation, a, b in every
            if ((operation, min(a, b), max(a, b)) in held_out) == (self.split == "val")
        )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Prompt:
        item = self._items[index]
        answer = item.a + item.b if item.operation == "sum" else item.a * item.b
        asked = WORDINGS[item.operation][item.wording].format(a=item.a, b=item.b)
        return Prompt(
            key=f"arithmetic/{item.operation}/{item.a}/{item.b}/{item.wording}",
            messages=({"role": "user", "content": asked},),
            verifier=LAST_NUMBER,
            answer=str(answer),
            category=item.operation,
        )
