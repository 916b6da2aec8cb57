"""Measures how well the policy answers with a right response in its prompt, as its own teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import lightning as L

from scsdpo.analysis.module import given_prompts
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.evaluation import EvaluatedQuestion
from scsdpo.statistics import interval, paired_interval
from scsdpo.teacher import SiblingDemonstration
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Prompt


def with_demonstrations(
    trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule
) -> dict[str, Any]:
    """Accuracy with a right response of its own in the prompt, and with one to another question.

    It follows an evaluation by the same trainer. The best right response to each question is its
    demonstration, in the words of the model's teacher. The policy's own weights read it, and not
    those of an EMA. The control shows each question the demonstration of the next question that has
    one (the last one that of the first): a gain there does not come from the demonstration's
    content.

    Returns:
        `questions`: number of questions with a demonstration; estimates of mean@k over them:
        `without`, `own`, `another`; and paired differences `own_gain`, `another_gain`,
        `own_over_another`.

    Raises:
        ConfigurationError: if fewer than two questions have a demonstration.

    Source:
        The control: OP2SD, arXiv:2608.09228.
    """
    found = model.evaluation.result.questions
    prompts = list(islice(data.val_prompts(), len(found)))
    assert [p.key for p in prompts] == [q.key for q in found]
    context = model.teacher.context
    if not isinstance(context, SiblingDemonstration):
        context = SiblingDemonstration()
    solved = ((p, q, context.shown(p, q.right)) for p, q in zip(prompts, found, strict=True))
    shown = [(p, q, text) for p, q, text in solved if text.strip()]
    if len(shown) < 2:
        raise ConfigurationError(
            f"--demonstrations: {len(shown)} of {len(found)} questions were solved, and at least "
            "two must be; take easier questions, more responses or a better policy"
        )
    texts = [text for _, _, text in shown]
    own, another = (
        _evaluated(
            trainer,
            model,
            data,
            context,
            [(p, text) for (p, _, _), text in zip(shown, order, strict=True)],
        )
        for order in (texts, [*texts[1:], texts[0]])
    )
    return _summary(_means([q for _, q, _ in shown]), _means(own), _means(another))


def _evaluated(
    trainer: L.Trainer,
    model: PolicyOptimizer,
    data: TaskDataModule,
    context: SiblingDemonstration,
    pairs: Sequence[tuple[Prompt, str]],
) -> Sequence[EvaluatedQuestion]:
    """Evaluate prompts with a demonstration in each."""
    # Keys have the place in them, for a question may come twice with different demonstrations.
    data.val_sources = [
        given_prompts(
            replace(
                prompt,
                key=f"{place}/{prompt.key}",
                messages=tuple(context.templates.fill(prompt.messages, demonstration=text)),
            )
            for place, (prompt, text) in enumerate(pairs)
        )
    ]
    data.max_prompt_tokens = context.max_tokens
    trainer.validate(model, data, verbose=False)
    return model.evaluation.result.questions


def _means(questions: Sequence[EvaluatedQuestion]) -> list[tuple[str, float]]:
    return [(q.key, sum(q.rewards) / len(q.rewards)) for q in questions]


def _summary(
    without: Sequence[tuple[str, float]],
    own: Sequence[tuple[str, float]],
    another: Sequence[tuple[str, float]],
) -> dict[str, Any]:
    """Estimates over the questions whose prompts were short enough with both demonstrations."""
    plain = {f"{place}/{key}": value for place, (key, value) in enumerate(without)}
    left, right = dict(own), dict(another)
    keys = [key for key in plain if key in left and key in right]
    a, b, c = ([table[key] for key in keys] for table in (plain, left, right))

    def gain(high: Sequence[float], low: Sequence[float]) -> Mapping[str, Any]:
        return asdict(paired_interval(low, high))

    return {
        "questions": len(keys),
        "without": asdict(interval(a)),
        "own": asdict(interval(b)),
        "another": asdict(interval(c)),
        "own_gain": gain(b, a),
        "another_gain": gain(c, a),
        "own_over_another": gain(b, c),
    }
