"""What the lab's questions have in common, whatever their shape."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

from scsdpo.types import Message
from scsdpo.verifiers import Verifier

LEVELS = (1, 2, 3, 4)
"""The difficulties: a question of level n has n steps, and as many pitfalls."""


class Question(ABC):
    """A question that knows its answer, its worked response and the mistakes that it invites."""

    shape: ClassVar[str]
    """Which kind of question it is, in one word."""
    wordings: ClassVar[int]
    """In how many ways a response can be put."""

    @property
    @abstractmethod
    def messages(self) -> tuple[Message, ...]:
        """The chat turns that put the question."""

    @property
    @abstractmethod
    def answer(self) -> str:
        """The gold answer, as `verifier` compares it."""

    @property
    @abstractmethod
    def verifier(self) -> Verifier:
        """Judges responses."""

    @property
    @abstractmethod
    def pitfalls(self) -> tuple[str, ...]:
        """The name of the mistake that each step of the work invites, in the order of the work."""

    @abstractmethod
    def work(self, *, wording: int = 0, mistakes: Collection[int] = ()) -> list[str]:
        """The response cut after each step: opening, one part per pitfall, closing.

        Args:
            wording: in [0, wordings); changes words, never numbers.
            mistakes: indices of the pitfalls fallen into. What follows a mistake is consistent
                with it; a single mistake always ends in a wrong answer.
        """

    def response(self, *, wording: int = 0, mistakes: Collection[int] = ()) -> str:
        """The whole response, `work` joined; right where there are no `mistakes`."""
        return "".join(self.work(wording=wording, mistakes=mistakes))
