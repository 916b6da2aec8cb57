"""The base class of the lab's questions."""

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
    """The kind of question, in one word."""
    wordings: ClassVar[int]
    """Number of wordings of a response."""

    @property
    @abstractmethod
    def messages(self) -> tuple[Message, ...]:
        """The messages that ask the question."""

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
        """Name of the mistake that each step invites, in the order of the steps."""

    @abstractmethod
    def work(self, *, wording: int = 0, mistakes: Collection[int] = ()) -> list[str]:
        """The response, cut after each step: opening, one part per pitfall, closing.

        Args:
            wording: in [0, wordings); changes words, never numbers.
            mistakes: indices of the steps with a mistake. Later steps are consistent with it; a
                single mistake always gives a wrong answer.
        """

    def response(self, *, wording: int = 0, mistakes: Collection[int] = ()) -> str:
        """The whole response, `work` joined; it is right if there are no `mistakes`."""
        return "".join(self.work(wording=wording, mistakes=mistakes))
