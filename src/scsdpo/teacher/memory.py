"""A context that remembers earlier successes."""

from collections.abc import Mapping
from typing import Any

from scsdpo.distributed import all_gather
from scsdpo.policy.chat import Chat
from scsdpo.state import Stateful
from scsdpo.teacher.context import Context, SiblingDemonstration
from scsdpo.types import Outcomes, Rollouts, TeacherContexts


class RememberedDemonstration(Context, Stateful):
    """A sibling's success; in a group without any, the last one of an earlier visit.

    Groups with a success are told what `demonstration` says. Each question keeps its last `size`
    different successes, of earlier policies; they are checkpointed, and the same on every rank.
    Memory grows with the number of distinct questions.

    Args:
        demonstration: how a success is picked and shown.
        size: successes kept a question. Must be >= 1.

    Raises:
        ValueError: if `size` < 1.

    Source:
        DRIFT, arXiv:2606.30345: 3 a question in the paper, 4 in its published pseudocode.
    """

    def __init__(
        self, demonstration: SiblingDemonstration = SiblingDemonstration(), size: int = 3
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"`RememberedDemonstration(size=...)` must be >= 1, got {size}")
        self.demonstration, self.size = demonstration, size
        self.kept: dict[str, list[str]] = {}

    def render(self, chat: Chat, rollouts: Rollouts, outcomes: Outcomes) -> TeacherContexts:
        table = list(self.demonstration.render(chat, rollouts, outcomes).ids)
        for q, prompt in enumerate(rollouts.prompts):
            if prompt.key in self.kept and not outcomes.successes[q].any():
                text = self.demonstration.shown(self.kept[prompt.key][-1])
                table[q] = (self.demonstration.show(chat, prompt, text),) * len(table[q])
        self._remember(rollouts, outcomes)
        return TeacherContexts(ids=tuple(table))

    def _remember(self, rollouts: Rollouts, outcomes: Outcomes) -> None:
        good = [
            (prompt.key, text)
            for prompt, texts, right in zip(
                rollouts.prompts, rollouts.texts, outcomes.successes.tolist(), strict=True
            )
            for text, success in zip(texts, right, strict=True)
            if success
        ]
        for key, text in all_gather(good):
            others = [kept for kept in self.kept.get(key, []) if kept != text]
            self.kept[key] = [*others, text][-self.size :]

    def remembered(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.kept = dict(remembered["kept"])
