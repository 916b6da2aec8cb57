"""Figures of an evaluation: means over questions with their intervals, by task and category."""

from collections.abc import Sequence

import torch

from scsdpo.evaluation.question import EvaluatedQuestion
from scsdpo.metrics import MajAtK, MeanAtK
from scsdpo.statistics import Estimate, interval

Figures = dict[str, dict[str, Estimate]]
"""Estimates by category ('': all questions), then by name."""
LEVEL = 0.95


def by_category(questions: Sequence[EvaluatedQuestion]) -> dict[str, list[EvaluatedQuestion]]:
    """Questions by category: '' has all, `math` also `math/level2`'s; a lone one is omitted."""
    groups: dict[str, list[EvaluatedQuestion]] = {"": list(questions)}
    for question in questions:
        parts = question.category.split("/") if question.category else []
        for end in range(1, len(parts) + 1):
            groups.setdefault("/".join(parts[:end]), []).append(question)
    names = sorted(groups)
    return {name: groups[name] for name in (names[:1] if len(names) == 2 else names)}


def figures(questions: Sequence[EvaluatedQuestion]) -> Figures:
    """Every score of `Question.scores` as a mean over questions, with its 95 % interval."""
    found: Figures = {}
    for name, group in by_category(questions).items():
        rows = [question.scores() for question in group]
        found[name] = {
            score: interval([row[score] for row in rows], level=LEVEL)
            for score in (rows[0] if rows else ())
        }
    return found


def means(questions: Sequence[EvaluatedQuestion]) -> dict[str, float]:
    """The figures that a run logs: `mean@k`, `maj@k`, `CATEGORY/mean@k`, `CATEGORY/maj@k`."""
    found = {}
    for name, group in by_category(questions).items() if questions else ():
        # Every rank has all questions.
        mean, majority = MeanAtK(sync_on_compute=False), MajAtK(sync_on_compute=False)
        for question in group:
            rewards = torch.tensor([question.rewards], dtype=torch.float64)
            mean.update(rewards)
            majority.update(rewards, [question.answers])
        prefix, k = f"{name}/" if name else "", len(group[0].rewards)
        found[f"{prefix}mean@{k}"] = float(mean.compute())
        found[f"{prefix}maj@{k}"] = float(majority.compute())
    return found
