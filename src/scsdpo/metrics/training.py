"""What the log shows of a training step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from scsdpo.distributed import all_sum
from scsdpo.loss import LossOutput
from scsdpo.types import Outcomes, Rollouts


def rollout_metrics(rollouts: Rollouts, outcomes: Outcomes, weights: Tensor) -> dict[str, float]:
    """Of one rank's batch: pass rate, lengths, and so on.

    Shares of questions: `solve_none` (p = 0), `solve_all` (p = 1), `informative` (0 < p < 1),
    `medium` (1/8 <= p <= 7/8), `central` (2/8 <= p <= 6/8).

    `effective_questions` is the effective sample size of the question weights,
    (sum_j W_j)^2 / sum_j W_j^2: Q under uniform weights, 0 when all are 0.
    """
    p = outcomes.pass_rates
    per_question = weights.double().mean(-1)
    square = per_question.square().sum()
    errors = [bool(verdict.error) for group in outcomes.verdicts for verdict in group]
    return {
        "pass_rate": float(p.mean()),
        "reward": float(outcomes.rewards.double().mean()),
        "solve_none": float((p == 0).double().mean()),
        "solve_all": float((p == 1).double().mean()),
        "informative": float(((p > 0) & (p < 1)).double().mean()),
        "medium": float(((p >= 1 / 8) & (p <= 7 / 8)).double().mean()),
        "central": float(((p >= 2 / 8) & (p <= 6 / 8)).double().mean()),
        "response_length": float(rollouts.lengths.double().mean()),
        "truncated": float((~rollouts.finished).double().mean()),
        "effective_questions": float(per_question.sum().square() / square) if square > 0 else 0.0,
        "verifier_errors": float(sum(errors)),
    }


def token_metrics(outputs: Iterable[LossOutput], objective: str) -> dict[str, float]:
    """Means over the tokens that were trained on, all ranks; empty if there were none.

    Args:
        outputs: per micro-batch the kernel's output.
        objective: name under which the mean objective is shown.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for output in outputs:
        columns = (output.objective.double(), output.entropy.double())
        count = output.objective.new_tensor(len(output.objective), dtype=torch.float64)
        sums += torch.stack([*(c.sum() for c in columns), count]).cpu()
    *total, count = all_sum(sums).tolist()
    names = (objective, "entropy")
    return {n: value / count for n, value in zip(names, total, strict=True)} if count else {}
