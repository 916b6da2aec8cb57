"""What a teacher is told before training, and how much better it answers then."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from scsdpo.statistics import Estimate, paired_interval, score_interval
from scsdpo.teacher import (
    Context,
    Feedback,
    GoldSolution,
    RememberedDemonstration,
    SiblingDemonstration,
)
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Judged, Prompt, TeacherContexts

Shown = SiblingDemonstration | GoldSolution
"""Contexts of which another question's demonstration can take the place."""


@dataclass(frozen=True, kw_only=True)
class Telling:
    """One way of telling the teacher something: accuracy of responses drawn after its prompt."""

    without: Estimate
    """The policy's own accuracy on the same questions, in responses drawn anew: those that are
    shown were chosen for a success."""
    told: Estimate
    gain: Estimate
    """Paired by question."""
    beyond_another: Estimate | None = None
    """Of `configured`: told minus that told of another question, paired by question."""


class Asked(NamedTuple):
    """A question, and what is read in its place; empty: there is nothing to tell."""

    prompt: Prompt
    ids: tuple[int, ...]


def tellings(
    model: PolicyOptimizer, halves: Sequence[Judged], contexts: Sequence[TeacherContexts]
) -> dict[str, Telling]:
    """Answer what each way of telling makes of the questions.

    Args:
        model: configured.
        halves: responses, of which some are shown, and their verdicts.
        contexts: what the configured context made of each half.

    Returns:
        `configured`, `another`, `gold`, `feedback`: as in `Readiness`; those that at least two
        questions have.
    """
    configured = _asked(halves, contexts)
    another = _swapped(model, halves, configured)
    ways = {"configured": configured, "another": another, **_others(model, halves)}
    ways = {name: asked for name, asked in ways.items() if len(asked) > 1}
    prompts = {one.prompt.key: one.prompt for asked in ways.values() for one in asked}
    own = _rates(model, "own", [Asked(prompt, prompt.ids) for prompt in prompts.values()])
    told = {name: _rates(model, name, asked) for name, asked in ways.items()}
    found = {name: _telling(rates, own) for name, rates in told.items()}
    if "another" in found:
        beyond = _gain(told["configured"], told["another"])
        found["configured"] = replace(found["configured"], beyond_another=beyond)
    return found


def _asked(halves: Sequence[Judged], contexts: Iterable[TeacherContexts]) -> list[Asked]:
    """Of each question the first prompt of its rollouts' teachers, if any."""
    return [
        Asked(prompt, ids)
        for judged, table in zip(halves, contexts, strict=True)
        for prompt, group in zip(judged.prompts, table.ids, strict=True)
        if (ids := next((ids for ids in group if ids), ()))
    ]


def _others(model: PolicyOptimizer, halves: Sequence[Judged]) -> dict[str, list[Asked]]:
    """What could be told and is not."""
    context, chat = model.teacher.context, model.policy.chat
    words: SiblingDemonstration | Feedback | GoldSolution = SiblingDemonstration()
    if isinstance(context, SiblingDemonstration | Feedback | GoldSolution):
        words = context
    found = {}
    for name, kind in (("gold", GoldSolution), ("feedback", Feedback)):
        if not isinstance(context, kind):
            way = kind(templates=words.templates, max_tokens=words.max_tokens)
            found[name] = _asked(halves, [way.render(chat, half) for half in halves])
    return found


def _swapped(
    model: PolicyOptimizer, halves: Sequence[Judged], configured: Sequence[Asked]
) -> list[Asked]:
    """Each question that is shown a demonstration, with the next one's."""
    shown_by = _shown_by(model.teacher.context)
    if shown_by is None:
        return []
    told = {one.prompt.key for one in configured}
    shown = [
        (prompt, text)
        for judged in halves
        for q, prompt in enumerate(judged.prompts)
        if prompt.key in told and (text := _demonstration(shown_by, q, judged))
    ]
    return [
        Asked(prompt, ids)
        for (prompt, _), (_, text) in zip(shown, shown[1:] + shown[:1], strict=True)
        if (ids := shown_by.show(model.policy.chat, prompt, text))
    ]


def _shown_by(context: Context) -> Shown | None:
    if isinstance(context, RememberedDemonstration):
        return context.demonstration
    return context if isinstance(context, SiblingDemonstration | GoldSolution) else None


def _demonstration(shown_by: Shown, question: int, judged: Judged) -> str:
    if isinstance(shown_by, GoldSolution):
        return judged.prompts[question].answer
    return shown_by.demonstration(question, -1, judged)  # to none of them


def _rates(model: PolicyOptimizer, name: str, asked: Sequence[Asked]) -> dict[str, float]:
    """Pass rate of each question, by its key."""
    prompts = [  # keys of their own, for draws of their own
        replace(one.prompt, key=f"{name}/{one.prompt.key}", ids=one.ids) for one in asked
    ]
    if not prompts:
        return {}
    rates = model.judge(model.sample(prompts, model.sampling.at(0))).pass_rates.tolist()
    return {one.prompt.key: rate for one, rate in zip(asked, rates, strict=True)}


def _telling(told: dict[str, float], own: dict[str, float]) -> Telling:
    return Telling(
        without=score_interval([own[key] for key in told]),
        told=score_interval([*told.values()]),
        gain=_gain(told, own),
    )


def _gain(told: dict[str, float], without: dict[str, float]) -> Estimate:
    """Of the questions that have both."""
    both = [key for key in told if key in without]
    return paired_interval([without[key] for key in both], [told[key] for key in both])
