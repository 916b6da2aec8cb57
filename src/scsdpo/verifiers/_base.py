"""The contract of a verifier."""

from abc import ABC, abstractmethod

from scsdpo.types import Prompt, Verdict


class Verifier(ABC):
    """Judges a response: (prompt, response text) -> `Verdict`.

    A verifier is a frozen dataclass: picklable, so that prompts can carry it between processes,
    and without state, so that its verdicts do not depend on what was judged before.
    """

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict on one response. It may be slow or raise: `verify_all` contains both."""
