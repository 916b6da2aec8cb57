"""Contexts: the prompts that a teacher reads, with information that the student does not have."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from scsdpo.contracts import declared
from scsdpo.policy.chat import Chat
from scsdpo.teacher.templates import ATTEMPT_WORDS, Templates
from scsdpo.thinking import without_thinking
from scsdpo.types import Judged, Prompt, TeacherContexts


class Context(ABC):
    """Renders the teacher's prompt for each rollout, with privileged information f in it.

    A text of white space alone counts as no information.
    """

    @declared
    def named(self) -> "Mapping[str, Context]":
        """Name -> context that the teacher's weights read. The first one is the teacher's own."""
        return {"": self}

    @abstractmethod
    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        """Teacher prompts [Q][G]; an empty one where the rollout has no teacher."""


@dataclass(frozen=True)
class PlainPrompt(Context):
    """No privileged information: the teacher reads the student's prompt. For KL anchors."""

    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        group = judged.rewards.shape[1]
        return TeacherContexts(ids=tuple((prompt.ids,) * group for prompt in judged.prompts))


@dataclass(frozen=True, kw_only=True)
class Contexts(Context):
    """Several contexts; the teacher's weights run the same response after each of them.

    The first is the teacher's own: T is the distribution after it. An advantage reads the others by
    their place, `chunk.others[0]()`, or their log-probs at the sampled tokens, the table
    `Signals.others`. Equal pairs of weights and context run once.

    Args:
        parts: name -> context, in order; at least one, and none of them `Contexts`.
        needed: a rollout has a teacher if it has so many of the first contexts; 0: all of them.

    Raises:
        ValueError: if there are no parts, or `needed` is more than there are.
    """

    parts: Mapping[str, Context] = field(default_factory=dict)
    needed: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("`Contexts(parts=...)` must name at least one context, got none")
        nested = [name for name, part in self.parts.items() if isinstance(part, Contexts)]
        if nested:
            raise ValueError(f"`Contexts(parts=...)` must not be nested: {nested[0]} is Contexts")
        if not 0 <= self.needed <= len(self.parts):
            raise ValueError(
                f"`Contexts(needed=...)` must be between 0 and {len(self.parts)}, got {self.needed}"
            )

    @property
    def named(self) -> Mapping[str, Context]:
        return self.parts

    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        return next(iter(self.parts.values())).render(chat, judged)


@dataclass(frozen=True, kw_only=True)
class PrivilegedInfo:
    """The information that one rollout's teacher reads and the student does not.

    If both texts are empty, the rollout has no teacher.
    """

    demonstration: str = ""
    """Shown as a correct solution."""
    feedback: str = ""
    """Shown as feedback on an attempt."""


@dataclass(frozen=True, kw_only=True)
class _Rewritten(Context):
    """Rewrites the last user turn with templates. Subclasses give the information and the words."""

    max_tokens: int = 10240

    @declared
    @abstractmethod
    def words(self) -> Templates:
        """The words around the information."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(
                f"`{type(self).__name__}(max_tokens=...)` must be >= 1, got {self.max_tokens}"
            )

    @abstractmethod
    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        """The information for the teacher of this rollout.

        Args:
            question: its number q.
            rollout: its number g within the question.
            judged: the batch.
        """

    def render(self, chat: Chat, judged: Judged) -> TeacherContexts:
        questions, group = judged.rewards.shape
        rendered: dict[tuple[int, PrivilegedInfo], tuple[int, ...]] = {}
        table = []
        for q in range(questions):
            infos = [self.privileged(q, g, judged) for g in range(group)]
            for info in infos:
                if (q, info) not in rendered:
                    rendered[q, info] = self._fit(chat, judged.prompts[q], info)
            table.append(tuple(rendered[q, info] for info in infos))
        return TeacherContexts(ids=tuple(table))

    def show(self, chat: Chat, prompt: Prompt, demonstration: str) -> tuple[int, ...]:
        """The teacher prompt with `demonstration`; empty if it does not fit."""
        return self._fit(chat, prompt, PrivilegedInfo(demonstration=demonstration))

    def _fit(self, chat: Chat, prompt: Prompt, info: PrivilegedInfo) -> tuple[int, ...]:
        return fit(chat, prompt, info, self.words, self.max_tokens)


def fit(
    chat: Chat, prompt: Prompt, info: PrivilegedInfo, templates: Templates, max_tokens: int
) -> tuple[int, ...]:
    """Render a teacher prompt of at most `max_tokens` ids; empty if that cannot be done.

    The information alone is cut, at its beginning, for an answer stands at the end. Template and
    question stay whole.
    """
    demonstration, feedback = info.demonstration, info.feedback
    while demonstration.strip() or feedback.strip():
        messages = templates.fill(prompt.messages, demonstration=demonstration, feedback=feedback)
        ids = chat.render(messages, prompt.tools)
        excess = len(ids) - max_tokens
        if excess <= 0:
            return ids
        if demonstration.strip():
            demonstration = _cut(chat, demonstration, excess)
        else:
            feedback = _cut(chat, feedback, excess)
    return ()


def _cut(chat: Chat, text: str, tokens: int) -> str:
    """`text` without its first `tokens` tokens; strictly shorter."""
    shorter = chat.decode(chat.encode(text)[tokens:])
    return shorter if len(shorter) < len(text) else text[1:]


@dataclass(frozen=True, kw_only=True)
class Reprompt(_Rewritten):
    """The base class for your own contexts: override `privileged`, and it is told in SDPO's words.

    Equal prompts of a question are rendered once. System turn and earlier turns stay. Question and
    template are never cut; the information is cut at its beginning to `max_tokens` in all.

        @dataclass(frozen=True, kw_only=True)
        class Hint(Reprompt):
            def privileged(self, question, rollout, judged):
                return PrivilegedInfo(demonstration=f"It is {judged.prompts[question].answer}.")
    """

    templates: Templates = Templates()

    @declared
    def words(self) -> Templates:
        return self.templates


@dataclass(frozen=True, kw_only=True)
class SiblingDemonstration(Reprompt):
    """The best successful rollout of the same question, shown as a correct solution.

    The best one has the highest reward; `pick` chooses among equal rewards. A success that is
    nothing but thinking is not shown. A rollout without a (different) successful sibling has no
    teacher and no loss: with `exclude_self`, the only success of a group has none, but its failures
    have one.

    Args:
        pick: among successes with the same reward, the `first` in the group's order, or the
            `shortest` in tokens (the first of equal ones).
        exclude_self: never show a rollout to its own teacher.
        strip_thinking: drop thinking, in the tags of the common models, from the demonstration.
        templates: the words around the demonstration.
        max_tokens: cap on the rendered teacher prompt. The demonstration is cut, never the
            template or the question; if those alone are too long, the rollout has no teacher.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802, and its code.
    """

    pick: Literal["first", "shortest"] = "first"
    exclude_self: bool = True
    strip_thinking: bool = True

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        return PrivilegedInfo(demonstration=self.demonstration(question, rollout, judged))

    def demonstration(self, question: int, rollout: int, judged: Judged) -> str:
        """The text to show; empty if there is none."""
        for g, text in self.demonstrations(question, judged):
            if g != rollout or not self.exclude_self:
                return text
        return ""

    def demonstrations(self, question: int, judged: Judged) -> Iterator[tuple[int, str]]:
        """(rollout, text to show) of a question's successes, the preferred one first."""
        best = judged.best_first(question)
        if self.pick == "shortest":
            rewards = judged.rewards[question].tolist()
            lengths = judged.lengths[question].tolist()
            best.sort(key=lambda g: (-rewards[g], lengths[g]))
        for g in best:
            text = shown_text(judged, question, g, strip_thinking=self.strip_thinking)
            if text.strip():
                yield g, text

    def shown(self, prompt: Prompt, text: str) -> str:
        """The part of a response to `prompt` that is shown."""
        return without_thinking(prompt.thinking + text) if self.strip_thinking else text


@dataclass(frozen=True, kw_only=True)
class Feedback(Reprompt):
    """The verifier's feedback on the rollout's own failed attempt.

    Successful rollouts, and failures without feedback, have no teacher.

    Args:
        templates: the words around the feedback.
        max_tokens: as in `SiblingDemonstration`.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802.
    """

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        return PrivilegedInfo(feedback=own_feedback(question, rollout, judged))


@dataclass(frozen=True, kw_only=True)
class SiblingOfSeveral(SiblingDemonstration):
    """A successful sibling, in groups with several successes only.

    Args:
        pick: as in `SiblingDemonstration`.
        exclude_self: as in `SiblingDemonstration`.
        strip_thinking: as in `SiblingDemonstration`.
        least_successes: rollouts of a group with fewer successes have no teacher.
        templates: the words around the demonstration.
        max_tokens: as in `SiblingDemonstration`.

    Raises:
        ValueError: if `least_successes` < 1.

    Source:
        SC-GRPO, arXiv:2606.18810: at least two.
    """

    least_successes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least_successes < 1:
            raise ValueError(
                f"`SiblingOfSeveral(least_successes=...)` must be >= 1, got {self.least_successes}"
            )

    def demonstrations(self, question: int, judged: Judged) -> Iterator[tuple[int, str]]:
        if int(judged.successes[question].sum()) >= self.least_successes:
            yield from super().demonstrations(question, judged)


@dataclass(frozen=True, kw_only=True)
class DemonstrationOrFeedback(SiblingDemonstration):
    """A sibling's success if there is one, else the feedback on the rollout's own failure.

    Args:
        pick: as in `SiblingDemonstration`.
        exclude_self: as in `SiblingDemonstration`.
        strip_thinking: as in `SiblingDemonstration`.
        both: show the feedback beside the demonstration, too.
        templates: the words around them.
        max_tokens: as in `SiblingDemonstration`; the demonstration is cut first.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802.
    """

    both: bool = False

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        demonstration = self.demonstration(question, rollout, judged)
        if demonstration and not self.both:
            return PrivilegedInfo(demonstration=demonstration)
        return PrivilegedInfo(
            demonstration=demonstration, feedback=own_feedback(question, rollout, judged)
        )


@dataclass(frozen=True, kw_only=True)
class GoldSolution(Reprompt):
    """The data's own answer (`Prompt.answer`), shown as a correct solution to every rollout.

    Successes have a teacher as well. Rollouts of a question without an answer have none.

    Args:
        templates: the words around the answer.
        max_tokens: as in `SiblingDemonstration`.

    Source:
        OPSD, arXiv:2601.18734.
    """

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        return PrivilegedInfo(demonstration=judged.prompts[question].answer)


@dataclass(frozen=True, kw_only=True)
class SolutionAlone(Reprompt):
    """The gold solution without the question.

    It shows what the words of a solution alone make likely. The template's {prompt} is empty;
    system turn and earlier turns stay.

    Args:
        templates: the words around the solution.
        max_tokens: as in `SiblingDemonstration`.

    Source:
        Purified OPSD, arXiv:2607.02234, its second forward (r without q). The words are ours.
    """

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        return PrivilegedInfo(demonstration=judged.prompts[question].answer)

    def _fit(self, chat: Chat, prompt: Prompt, info: PrivilegedInfo) -> tuple[int, ...]:
        *earlier, last = prompt.messages
        alone = replace(prompt, messages=(*earlier, {**last, "content": ""}))
        return super()._fit(chat, alone, info)


@dataclass(frozen=True, kw_only=True)
class FailedSibling(Reprompt):
    """A wrong rollout of the same question, shown as if it were a solution, for a contrast.

    Args:
        number: number of the failure among the others, in the group's order, from 0. Where there
            are fewer, the rollout does not have this context.
        strip_thinking: drop thinking, in the tags of the common models, from the failure.
        templates: the words around the failure.
        max_tokens: as in `SiblingDemonstration`.

    Raises:
        ValueError: if `number` < 0.

    Source:
        RLCSD, arXiv:2606.11709: its hints y-_k. The words are SDPO's.
    """

    number: int = 0
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.number < 0:
            raise ValueError(f"`FailedSibling(number=...)` must be >= 0, got {self.number}")

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        wrong = (~judged.successes[question]).nonzero()[:, 0].tolist()
        shown = [
            shown_text(judged, question, g, strip_thinking=self.strip_thinking)
            for g in wrong
            if g != rollout
        ]
        said = [text for text in shown if text.strip()]
        return PrivilegedInfo(demonstration=said[self.number] if self.number < len(said) else "")


@dataclass(frozen=True, kw_only=True)
class ShortestSuccess(_Rewritten):
    """Only the shortest success of a group has a teacher, which reads another rollout of the group.

    It reads the group's shortest failure, or the second shortest success if all rollouts succeeded.
    The words say which of both it is. A rollout that is nothing but thinking is not shown. Among
    successes with different rewards, the shortest of the best ones has the teacher. Other rollouts,
    and groups without a success, are not learned from. No reference solution is needed.

    Args:
        strip_thinking: drop thinking, in the tags of the common models, from the shown rollout.
        attempt_templates: the words around it, {demonstration} if right, {feedback} if wrong.
        max_tokens: as in `SiblingDemonstration`.

    Source:
        OASIS, arXiv:2609.37915 (as reported by others).
    """

    strip_thinking: bool = True
    attempt_templates: Templates = ATTEMPT_WORDS

    @property
    def words(self) -> Templates:
        return self.attempt_templates

    def privileged(self, question: int, rollout: int, judged: Judged) -> PrivilegedInfo:
        lengths, rewards = judged.lengths[question].tolist(), judged.rewards[question].tolist()
        right = judged.best_first(question)
        taught = min(right, key=lambda g: (-rewards[g], lengths[g]), default=None)
        if rollout != taught:
            return PrivilegedInfo()
        others = [g for g in range(len(lengths)) if g != taught]
        for other in sorted(others, key=lambda g: (g in right, lengths[g])):
            shown = shown_text(judged, question, other, strip_thinking=self.strip_thinking)
            if shown.strip():
                return PrivilegedInfo(**{"demonstration" if other in right else "feedback": shown})
        return PrivilegedInfo()


def shown_text(judged: Judged, question: int, rollout: int, *, strip_thinking: bool) -> str:
    """The text of a response that is shown; of an episode, all turns with the world's answers."""
    opened = judged.prompts[question].thinking

    def bare(text: str) -> str:
        return without_thinking(opened + text) if strip_thinking else text

    episode = judged.responses.episodes[question][rollout]
    return episode.transcript(bare) if episode.parts else bare(judged.texts[question][rollout])


def own_feedback(question: int, rollout: int, judged: Judged) -> str:
    """Feedback on a failure, "" for a success; for an episode, on each turn and on the whole."""
    if judged.successes[question, rollout]:
        return ""
    episode = judged.responses.episodes[question][rollout]
    return episode.feedback or judged.verdicts[question][rollout].feedback
