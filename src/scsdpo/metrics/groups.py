"""torchmetrics over groups of k responses to each question, for any loop."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from scsdpo.statistics import majority


class _QuestionMean(Metric):
    """Mean over questions of one score per question; 0 questions give nan."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def _add(self, scores: Tensor) -> None:
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Scalar float64."""
        return self.total / self.count


class MeanAtK(_QuestionMean):
    """mean@k: the mean reward of k responses, then over questions.

    Shapes:
        update: rewards [Q, k].
    """

    def update(self, rewards: Tensor) -> None:
        """Add Q questions."""
        self._add(rewards.double().mean(-1))


class MajAtK(_QuestionMean):
    """maj@k: the reward of the most common answer among k responses, then over questions.

    Ties and responses without an answer are as in `scsdpo.statistics.majority`.

    Shapes:
        update: rewards [Q, k], answers [Q][k].
    """

    def update(self, rewards: Tensor, answers: Sequence[Sequence[str | None]]) -> None:
        """Add Q questions."""
        scores = [majority(*q) for q in zip(rewards.tolist(), answers, strict=True)]
        self._add(torch.tensor(scores, dtype=torch.float64))
