"""Compares the first step of a configuration with the gradient of the expected reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from scsdpo.advantage import GroupRelative, LeaveOneOut, Plan, Unscaled
from scsdpo.reduction import TokenSum
from scsdpo.statistics import Estimate, mean_interval
from scsdpo.training import Batch, PolicyOptimizer
from scsdpo.training.step import Update, trained_parameters
from scsdpo.types import Judged
from scsdpo.weighting import UniformTokens

Direction = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Cosines between directions in the space of all trained parameters.

    The reward's gradient g is a sum over questions, and so is its cosine with another direction d:
    cos = mean over q of n <d, g_q> / (|d| |g|). Student's interval is that of these n parts. d is
    computed on one half of the questions and g on the other, and vice versa; the parts of both are
    one sample. A half without d, or without g, is left out.

    Source:
        g_q: REINFORCE with a leave-one-out baseline, sum_i (r_i - mean of the others)
        grad log S(y_i).
    """

    step: Estimate
    """Cosine of minus the configured loss's gradient with the gradient of the expected reward."""
    length: Estimate
    """Cosine of minus the configured loss's gradient with the gradient of the expected length;
    above 0, responses grow."""
    reward: float
    """Cosine of the reward's gradient on one half with that on the other; near 0 it is noise."""
    shift: float
    """How far the first step moves the policy, in nats a token: see `shift_of`; nan: no step."""
    lr: float
    """The rate of that step; nan: the optimizer has none."""


def directions(model: PolicyOptimizer, halves: Sequence[Judged]) -> Directions:
    """Compare the configured first step with the reward's gradient, on disjoint questions.

    On the same rollouts both would have the same noise. On disjoint questions, a cosine below 0
    says that the step lowers the reward of other questions, to first order. This takes six backward
    passes, and memory for four gradients. Gradients must be enabled.

    Args:
        model: with its weights loaded.
        halves: two sets of rollouts, of different questions.
    """
    batches = [model.prepare(half) for half in halves]
    steps = [_step(model, batch) for batch in batches]

    def against(rewards: Callable[[Batch], Tensor]) -> tuple[Estimate, list[Direction]]:
        found = [
            _ascent(model, other, rewards(other), step)
            for step, other in zip(steps, reversed(batches), strict=True)
        ]
        parts = [part for parts, _ in found for part in parts]
        return mean_interval(parts), [direction for _, direction in found]

    step, up = against(lambda batch: batch.judged.rewards)
    reward = cosine(*up)
    del up
    length, _ = against(lambda batch: batch.judged.lengths.float())
    shift, lr = shift_of(model, steps, batches)
    return Directions(step=step, length=length, reward=reward, shift=shift, lr=lr)


@torch.no_grad()
def shift_of(
    model: PolicyOptimizer, steps: Sequence[Direction], batches: Sequence[Batch]
) -> tuple[float, float]:
    """How far one step of `model.optimizer` moves the policy elsewhere, and the step's rate.

        mean over tokens of (r - 1 - log r), r = S'(y) / S(y): an estimate of KL(S || S') >= 0

    S' is the policy after one step on the gradient of one half, by a new optimizer at its own rate
    (a schedule's factor is left out); y are the tokens that S drew for the other half. One mean of
    both ways. The weights are put back. It grows with the square of the rate while it is small.

    Args:
        model: configured.
        steps: minus the loss's gradient of each half.
        batches: the halves.

    Source:
        J. Schulman, "Approximating KL divergence", 2020 (k3).
    """
    parameters = trained_parameters(model.policy)
    kept = [p.detach().clone() for p in parameters]
    moved: list[Tensor] = []
    lr = math.nan
    for step, other in zip(steps, reversed(batches), strict=True):
        if _dot(step, step) == 0:
            continue
        before = _logprobs(model, other)
        for p, part in zip(parameters, step, strict=True):
            p.grad = -part.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, model.limits.max_grad_norm)
        optimizer = model.optimizer(parameters)
        lr = float(optimizer.param_groups[0].get("lr", math.nan))
        optimizer.step()
        del optimizer
        change = (_logprobs(model, other) - before).double()
        moved.append(change.expm1() - change)
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)
            p.grad = None
    return (float(torch.cat(moved).mean()) if moved else math.nan), lr


def _logprobs(model: PolicyOptimizer, batch: Batch) -> Tensor:
    """[N] log S(y) of every token that the policy drew."""
    everyone = torch.ones_like(batch.plan.active)
    alike = replace(
        batch,
        plan=Plan(active=everyone, credit=batch.plan.credit),
        weights=torch.ones_like(batch.weights),
    )
    budget = model.limits.token_budget(model.policy)
    found = model.steps.update.measure(model.policy, alike, range(len(batch.ids)), budget)
    return found[batch.sampled]


def cosine(a: Direction, b: Direction) -> float:
    """<a, b> / (|a| |b|); nan if one is 0."""
    size = (_dot(a, a) * _dot(b, b)) ** 0.5
    return _dot(a, b) / size if size > 0 else math.nan


def _dot(a: Direction, b: Direction) -> float:
    return sum(float(torch.dot(p, q)) for p, q in zip(a, b, strict=True))


def _step(model: PolicyOptimizer, batch: Batch) -> Direction:
    """Minus the gradient of the configured loss."""
    _backward(model, batch, model.steps.update, range(len(batch.ids)))
    return _taken(model)


def _ascent(
    model: PolicyOptimizer, batch: Batch, rewards: Tensor, along: Direction
) -> tuple[list[float], Direction]:
    """The gradient of the mean of `rewards` [Q, G] over responses.

    Returns:
        Each question's part of the gradient's cosine with `along` (none if one of the two is 0),
        and the gradient.
    """
    nobody = torch.zeros_like(batch.judged.successes)
    rewarded = replace(batch.judged, rewards=rewards)
    plan = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled()).planned(rewarded, nobody)
    update = replace(
        model.steps.update,
        reduction=TokenSum(constant=1.0),
        token_weighting=UniformTokens(),
        needs=frozenset(),
        derivations=(),
    )
    alike = replace(batch, plan=plan, weights=torch.ones_like(batch.weights))
    questions, group = rewards.shape
    sums = [0.0]
    for q in range(questions):
        _backward(model, alike, update, range(q * group, (q + 1) * group))
        sums.append(-_dot(along, _gradients(model)))
    direction = _taken(model)
    size = (_dot(along, along) * _dot(direction, direction)) ** 0.5
    if size == 0:
        return [], direction
    return [questions * (after - before) / size for before, after in pairwise(sums)], direction


def _backward(model: PolicyOptimizer, batch: Batch, update: Update, rows: Sequence[int]) -> None:
    """Add the gradient of these rows' part of the loss."""
    budget = model.limits.token_budget(model.policy)
    for output, _ in update.losses(model.policy, batch, rows, budget):
        output.loss.backward()


def _gradients(model: PolicyOptimizer) -> Direction:
    """The gradients that `_backward` has summed, flat; views where they are float32."""
    return [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in trained_parameters(model.policy)
    ]


def _taken(model: PolicyOptimizer) -> Direction:
    """Minus the gradients that `_backward` has summed; the sum starts at 0 again."""
    found = [gradient.neg_() for gradient in _gradients(model)]
    for p in trained_parameters(model.policy):
        p.grad = None
    return found
