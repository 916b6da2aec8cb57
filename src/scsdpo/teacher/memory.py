"""Contexts that remember earlier rollouts of a question."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from scsdpo.distributed import all_gather
from scsdpo.policy.chat import Chat
from scsdpo.state import Stateful
from scsdpo.teacher.context import (
    Context,
    PrivilegedInfo,
    SiblingDemonstration,
    fit,
    own_feedback,
    shown_text,
)
from scsdpo.teacher.templates import ATTEMPT_WORDS, Templates
from scsdpo.thinking import without_thinking
from scsdpo.types import Judged, TeacherContexts


class RememberedDemonstration(Context, Stateful):
    """A sibling's success; in a group without one, the best success of earlier batches.

    In groups with a success `demonstration` chooses what is shown. The `size` best different
    successes of each question are kept, the latest among equal ones, and the latest of the best is
    shown. A success of which nothing would be shown is not kept. What is kept is checkpointed, and
    is the same on every rank. Memory grows with the number of distinct questions.

    Args:
        demonstration: how a success is chosen and shown.
        size: number of successes that are kept per question. Must be >= 1.

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
        self.kept: dict[str, list[tuple[float, str]]] = {}
        """Question's key -> (reward, text to show) of its successes; the last one is shown."""

    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        table = list(self.demonstration.render(chat, judged).ids)
        for q, prompt in enumerate(judged.prompts):
            if prompt.key in self.kept and not any(self.demonstration.demonstrations(q, judged)):
                text = self.kept[prompt.key][-1][1]
                table[q] = (self.demonstration.show(chat, prompt, text),) * len(table[q])
        return TeacherContexts(ids=tuple(table))

    def observe(self, judged: Judged) -> None:
        rewards = judged.rewards.tolist()
        good = [
            (prompt.copy, prompt.key, rewards[q][g], text)
            for q, prompt in enumerate(judged.prompts)
            for g, text in sorted(self.demonstration.demonstrations(q, judged))
        ]
        # Sorted, so that the order of a question's copies does not depend on their ranks.
        for _, key, reward, text in sorted(all_gather(good), key=itemgetter(0)):
            others = [kept for kept in self.kept.get(key, []) if kept[1] != text]
            ranked = sorted([*others, (reward, text)], key=lambda kept: kept[0])
            self.kept[key] = ranked[-self.size :]

    def remembered(self) -> dict[str, Any]:
        return {"shown": self.kept}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        if "shown" in remembered:
            self.kept = dict(remembered["shown"])
            return
        # Checkpoints of earlier versions have whole responses, and the first of them no rewards.
        for key, responses in remembered["kept"].items():
            pairs = [(1.0, kept) if isinstance(kept, str) else kept for kept in responses]
            if self.demonstration.strip_thinking:
                pairs = [(reward, without_thinking(text)) for reward, text in pairs]
            self.kept[key] = pairs


class AttemptMemory(Context, Stateful):
    """The latest right and wrong rollouts of a question, from this batch and earlier ones.

    Each rollout's teacher reads all of them but the rollout itself. The latest `successes`
    different right rollouts and `failures` different wrong ones of each question are kept, wrong
    ones with the verifier's feedback. They are checkpointed, and the same on every rank. Memory
    grows with the number of distinct questions.

    Args:
        successes: number of right rollouts that are kept per question, >= 0.
        failures: number of wrong rollouts that are kept per question, >= 0.
        strip_thinking: drop thinking, in the tags of the common models, from what is kept.
        attempt_templates: the words around them, {demonstration} for right ones, {feedback} for
            wrong ones.
        max_tokens: cap on the rendered teacher prompt; the oldest right rollouts are cut first.

    Raises:
        ValueError: if nothing would be kept, or an argument is outside its range.

    Source:
        PMD, arXiv:2607.01480: 5 and 3, its memory of raw trajectories. Differs: PMD also keeps
        reflections on them that the policy writes.
    """

    def __init__(
        self,
        successes: int = 5,
        failures: int = 3,
        strip_thinking: bool = True,
        attempt_templates: Templates = ATTEMPT_WORDS,
        max_tokens: int = 10240,
    ) -> None:
        super().__init__()
        if min(successes, failures) < 0 or successes + failures < 1:
            raise ValueError(
                "`AttemptMemory(successes=..., failures=...)` must be >= 0, and not both 0, got "
                f"{successes} and {failures}"
            )
        if max_tokens < 1:
            raise ValueError(f"`AttemptMemory(max_tokens=...)` must be >= 1, got {max_tokens}")
        self.successes, self.failures, self.strip_thinking = successes, failures, strip_thinking
        self.attempt_templates, self.max_tokens = attempt_templates, max_tokens
        self.right: dict[str, list[str]] = {}
        self.wrong: dict[str, list[str]] = {}

    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        table = self._attempts(judged)
        right, wrong = self._after(judged, table)

        def info(key: str, own: str) -> PrivilegedInfo:
            good, bad = (
                "\n\n".join(entry for entry in kept.get(key, []) if entry != own)
                for kept in (right, wrong)
            )
            return PrivilegedInfo(demonstration=good, feedback=bad)

        return TeacherContexts(
            ids=tuple(
                tuple(
                    fit(chat, prompt, info(key, own), self.attempt_templates, self.max_tokens)
                    for key, _, own in group
                )
                for prompt, group in zip(judged.prompts, table, strict=True)
            )
        )

    def observe(self, judged: Judged) -> None:
        right, wrong = self._after(judged, self._attempts(judged))
        self.right |= right
        self.wrong |= wrong

    def _attempts(self, judged: Judged) -> list[list[tuple[str, bool, str]]]:
        """[Q][G]: (question's key, the rollout was right, its text and feedback)."""
        return [
            [(prompt.key, right, self._entry(q, g, judged)) for g, right in enumerate(successes)]
            for q, (prompt, successes) in enumerate(
                zip(judged.prompts, judged.successes.tolist(), strict=True)
            )
        ]

    def _after(
        self, judged: Judged, table: list[list[tuple[str, bool, str]]]
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Right and wrong entries of all ranks' questions in the batch, with this batch's."""
        copies = [prompt.copy for prompt in judged.prompts]
        mine = [
            (copy, *one)
            for copy, group in zip(copies, table, strict=True)
            for one in group
            if one[-1].strip()
        ]
        # Sorted, so that the order of a question's copies does not depend on their ranks.
        attempts = sorted(all_gather(mine), key=itemgetter(0))
        keys = {key for _, key, _, _ in attempts}
        right, wrong = ({k: old[k] for k in keys & old.keys()} for old in (self.right, self.wrong))
        for _, key, good, entry in attempts:
            kept, size = (right, self.successes) if good else (wrong, self.failures)
            others = [other for other in kept.get(key, []) if other != entry]
            kept[key] = [*others, entry][max(len(others) + 1 - size, 0) :]
        return right, wrong

    def _entry(self, question: int, rollout: int, judged: Judged) -> str:
        text = shown_text(judged, question, rollout, strip_thinking=self.strip_thinking)
        feedback = own_feedback(question, rollout, judged)
        return f"{text}\n{feedback}" if feedback.strip() else text

    def remembered(self) -> dict[str, Any]:
        return {"right": self.right, "wrong": self.wrong}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.right, self.wrong = dict(remembered["right"]), dict(remembered["wrong"])
