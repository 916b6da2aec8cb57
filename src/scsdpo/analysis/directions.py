"""Where the first step of a configuration points, and where the expected reward grows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scsdpo.advantage import GroupRelative, LeaveOneOut, Unscaled
from scsdpo.reduction import TokenSum
from scsdpo.training import Batch, PolicyOptimizer
from scsdpo.training.update import Update
from scsdpo.types import Outcomes, Rollouts
from scsdpo.weighting import UniformTokens

Answered = tuple[Rollouts, Outcomes]
Direction = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Cosines between directions of ascent, over all trained parameters.

    Source:
        The reward's: REINFORCE with a leave-one-out baseline, (r_i - mean of the others) times
        grad log S(y_i).
    """

    step: tuple[float, ...]
    """Minus the configured loss's gradient on one half of the questions with the expected reward's
    gradient on the other half, both ways; nan: that half gives no gradient."""
    reward: float
    """The reward's gradient on one half with that on the other: how much of it is seen."""
    length: tuple[float, ...]
    """As `step`, with the gradient of the expected length: above 0, responses grow."""


def directions(model: PolicyOptimizer, halves: Sequence[Answered]) -> Directions:
    """Compare the configured first step with the way up, each on questions that the other lacks.

    On the same rollouts the two would agree or not by chance alike; on disjoint questions a cosine
    below 0 says that the step lowers the reward elsewhere, to first order. Takes six backward
    passes, and memory for four gradients. Needs gradients enabled.

    Args:
        model: configured.
        halves: two sets of rollouts, of different questions.
    """
    first, second = batches = [model.prepare(*half) for half in halves]
    steps = [_direction(model, batch, model.steps.update) for batch in batches]
    up = [_ascent(model, batch, batch.outcomes.rewards) for batch in batches]
    reward = cosine(*up)
    step = tuple(cosine(own, other) for own, other in zip(steps, reversed(up), strict=True))
    del up
    longer = (_ascent(model, other, other.rollouts.lengths.float()) for other in (second, first))
    length = tuple(cosine(own, other) for own, other in zip(steps, longer, strict=True))
    return Directions(step=step, reward=reward, length=length)


def cosine(a: Direction, b: Direction) -> float:
    """<a, b> / (|a| |b|); nan where one is 0."""

    def dot(x: Direction, y: Direction) -> float:
        return sum(float(torch.dot(p, q)) for p, q in zip(x, y, strict=True))

    size = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / size if size > 0 else float("nan")


def _ascent(model: PolicyOptimizer, batch: Batch, rewards: Tensor) -> Direction:
    """Where the mean of `rewards` [Q, G] over responses grows."""
    nobody = torch.zeros_like(batch.outcomes.successes)
    rewarded = replace(batch.outcomes, rewards=rewards)
    plan = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled()).planned(rewarded, nobody)
    update = replace(
        model.steps.update,
        reduction=TokenSum(constant=1.0),
        token_weighting=UniformTokens(),
        needs=frozenset(),
        derivations=(),
    )
    alike = replace(batch, plan=plan, weights=torch.ones_like(batch.weights))
    return _direction(model, alike, update)


def _direction(model: PolicyOptimizer, batch: Batch, update: Update) -> Direction:
    """Minus the gradient of the loss, a flat tensor for each trained parameter."""
    trained = [p for p in model.policy.parameters() if p.requires_grad]
    budget = model.limits.token_budget(model.policy)
    for output, _ in update.losses(model.policy, batch, range(len(batch.mask)), budget):
        output.loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else -p.grad for p in trained]
    for p in trained:
        p.grad = None
    return [g.flatten().float() for g in found]
