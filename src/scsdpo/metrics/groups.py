"""Validation metrics over groups of k responses to each question."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from scsdpo.types import Outcomes, Rollouts


class _QuestionMean(Metric):
    """Mean over questions of one score per question; 0 questions give nan."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
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

    Responses without an answer do not vote. Among equally common answers the score is the mean
    over the winners, which is the expectation of drawing one at random; no votes score 0. Equal
    answers of different reward score their mean reward.

    Shapes:
        update: rewards [Q, k], answers [Q][k].
    """

    def update(self, rewards: Tensor, answers: Sequence[Sequence[str | None]]) -> None:
        """Add Q questions."""
        self._add(
            torch.tensor([_majority(*q) for q in zip(rewards.tolist(), answers, strict=True)])
        )


def _majority(rewards: Sequence[float], answers: Sequence[str | None]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    scores = []
    for winner in [answer for answer, n in votes.items() if n == most]:
        own = [r for r, answer in zip(rewards, answers, strict=True) if answer == winner]
        scores.append(sum(own) / len(own))
    return sum(scores) / len(scores)


class ByCategory:
    """mean@k and maj@k, overall and for each `Prompt.category`.

    A category may have parts, as in `source/level2`; then each beginning has metrics too.
    """

    def __init__(self) -> None:
        # Categories become known as their questions arrive; "" is the overall one.
        self._metrics: dict[str, tuple[MeanAtK, MajAtK]] = {}

    def update(self, rollouts: Rollouts, outcomes: Outcomes) -> None:
        """Add a batch of judged rollouts."""
        answers = [[verdict.answer for verdict in group] for group in outcomes.verdicts]
        for q, prompt in enumerate(rollouts.prompts):
            parts = prompt.category.split("/")
            for name in dict.fromkeys("/".join(parts[:n]) for n in range(len(parts) + 1)):
                mean, maj = self._of(name, outcomes.rewards.device)
                mean.update(outcomes.rewards[q : q + 1])
                maj.update(outcomes.rewards[q : q + 1], answers[q : q + 1])

    def _of(self, name: str, device: torch.device) -> tuple[MeanAtK, MajAtK]:
        if name not in self._metrics:
            self._metrics[name] = MeanAtK().to(device), MajAtK().to(device)
        return self._metrics[name]

    def compute(self, k: int, device: torch.device) -> dict[str, float]:
        """`mean@k`, `maj@k`, and `<category>/mean@k`, ... where there are several; all ranks."""
        names = _everywhere(list(self._metrics))
        if len(names) == 2:  # overall and a single category are the same
            names = names[:1]
        result = {}
        for name in names:
            mean, maj = self._of(name, device)
            prefix = f"{name}/" if name else ""
            result[f"{prefix}mean@{k}"] = float(mean.compute())
            result[f"{prefix}maj@{k}"] = float(maj.compute())
        return result

    def reset(self) -> None:
        """Forget everything."""
        self._metrics.clear()


def _everywhere(names: list[str]) -> list[str]:
    """The union over ranks, in one order: a rank may have met no question of some category."""
    if not (dist.is_available() and dist.is_initialized()):
        return sorted(names)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names)
    return sorted(set().union(*gathered))
