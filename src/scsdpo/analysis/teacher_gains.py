"""Measures, before training, how much better the policy answers after different teacher prompts."""

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


def teacher_gains(
    model: PolicyOptimizer, halves: Sequence[Judged], contexts: Sequence[TeacherContexts]
) -> dict[str, TeacherGain]:
    """Measure the gain from each kind of teacher prompt.

    Args:
        model: with its weights loaded.
        halves: judged responses, of which some are shown.
        contexts: prompts of the configured context, for each half.

    Returns:
        `configured`, `another`, `gold` and `feedback`, as in `Readiness.told`; those kinds that at
        least two questions have.
    """
    configured = _first_prompts(halves, contexts)
    another = _with_others_demonstrations(model, halves, configured)
    kinds = {"configured": configured, "another": another, **_not_configured(model, halves)}
    kinds = {name: asked for name, asked in kinds.items() if len(asked) > 1}
    prompts = {one.prompt.key: one.prompt for asked in kinds.values() for one in asked}
    alone = [PromptAsRead(prompt, prompt.ids) for prompt in prompts.values()]
    own = pass_rates(model, "own", alone)
    told = {name: pass_rates(model, name, asked) for name, asked in kinds.items()}
    found = {name: TeacherGain.of(rates, own) for name, rates in told.items()}
    if "another" in found:
        beyond = paired_gain(told["another"], told["configured"])
        found["configured"] = replace(found["configured"], beyond_another=beyond)
    return found


def _first_prompts(
    halves: Sequence[Judged], contexts: Iterable[TeacherContexts]
) -> list[PromptAsRead]:
    """Each question with the first teacher prompt of its rollouts, if there is one."""
    return [
        PromptAsRead(prompt, ids)
        for judged, table in zip(halves, contexts, strict=True)
        for prompt, group in zip(judged.prompts, table.ids, strict=True)
        if (ids := next((ids for ids in group if ids), ()))
    ]


def _not_configured(
    model: PolicyOptimizer, halves: Sequence[Judged]
) -> dict[str, list[PromptAsRead]]:
    """Prompts with information that the configured context does not use."""
    context, chat = model.teacher.context, model.policy.chat
    words: SiblingDemonstration | Feedback | GoldSolution = SiblingDemonstration()
    if isinstance(context, SiblingDemonstration | Feedback | GoldSolution):
        words = context
    found = {}
    for name, kind in (("gold", GoldSolution), ("feedback", Feedback)):
        if not isinstance(context, kind):
            other = kind(templates=words.templates, max_tokens=words.max_tokens)
            found[name] = _first_prompts(halves, [other.render(chat, half) for half in halves])
    return found


def _with_others_demonstrations(
    model: PolicyOptimizer, halves: Sequence[Judged], configured: Sequence[PromptAsRead]
) -> list[PromptAsRead]:
    """Each question that has a demonstration, with that of the next such question instead."""
    context = demonstrating_context(model.teacher.context)
    if context is None:
        return []
    keys = {one.prompt.key for one in configured}
    shown = [
        (prompt, text)
        for judged in halves
        for q, prompt in enumerate(judged.prompts)
        if prompt.key in keys and (text := demonstration(context, q, judged))
    ]
    return [
        PromptAsRead(prompt, ids)
        for (prompt, _), (_, text) in zip(shown, shown[1:] + shown[:1], strict=True)
        if (ids := context.show(model.policy.chat, prompt, text))
    ]
