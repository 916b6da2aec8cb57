"""What a teacher is told before training, and how much better it answers then."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from scsdpo.teacher import Feedback, GoldSolution, SiblingDemonstration
from scsdpo.training import PolicyOptimizer
from scsdpo.training.teacher_gain import (
    PromptAsRead,
    TeacherGain,
    demonstrating_context,
    demonstration,
    paired_gain,
    pass_rates,
)
from scsdpo.types import Judged, TeacherContexts


def tellings(
    model: PolicyOptimizer, halves: Sequence[Judged], contexts: Sequence[TeacherContexts]
) -> dict[str, TeacherGain]:
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
    own = pass_rates(
        model, "own", [PromptAsRead(prompt, prompt.ids) for prompt in prompts.values()]
    )
    told = {name: pass_rates(model, name, asked) for name, asked in ways.items()}
    found = {name: TeacherGain.of(rates, own) for name, rates in told.items()}
    if "another" in found:
        beyond = paired_gain(told["another"], told["configured"])
        found["configured"] = replace(found["configured"], beyond_another=beyond)
    return found


def _asked(halves: Sequence[Judged], contexts: Iterable[TeacherContexts]) -> list[PromptAsRead]:
    """Of each question the first prompt of its rollouts' teachers, if any."""
    return [
        PromptAsRead(prompt, ids)
        for judged, table in zip(halves, contexts, strict=True)
        for prompt, group in zip(judged.prompts, table.ids, strict=True)
        if (ids := next((ids for ids in group if ids), ()))
    ]


def _others(model: PolicyOptimizer, halves: Sequence[Judged]) -> dict[str, list[PromptAsRead]]:
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
    model: PolicyOptimizer, halves: Sequence[Judged], configured: Sequence[PromptAsRead]
) -> list[PromptAsRead]:
    """Each question that is shown a demonstration, with the next one's."""
    words = demonstrating_context(model.teacher.context)
    if words is None:
        return []
    told = {one.prompt.key for one in configured}
    shown = [
        (prompt, text)
        for judged in halves
        for q, prompt in enumerate(judged.prompts)
        if prompt.key in told and (text := demonstration(words, q, judged))
    ]
    return [
        PromptAsRead(prompt, ids)
        for (prompt, _), (_, text) in zip(shown, shown[1:] + shown[:1], strict=True)
        if (ids := words.show(model.policy.chat, prompt, text))
    ]
