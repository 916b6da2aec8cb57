"""Questions that a command makes for itself; no choice for a configuration."""

from collections.abc import Iterable

from scsdpo.data import Source
from scsdpo.data.prompts import PromptList
from scsdpo.types import Prompt


class _Told(PromptList):
    name = "told"

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = tuple(prompts)

    def load(self) -> Iterable[Prompt]:
        return self._prompts


def told(prompts: Iterable[Prompt]) -> Source:
    """A source of given prompts, e.g. of questions in which the policy is shown something."""
    return _Told(prompts)
