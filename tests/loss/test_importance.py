"""Importance weights by enumeration: what was drawn from mu stands for what S would have drawn."""

from itertools import product

import pytest
import torch

from kernel_inputs import identity_head, of_rewards, teacher_output
from scsdpo.advantage import (
    Divergence,
    GroupRelative,
    LeaveOneOut,
    Sampled,
    SelfDistillation,
    Unscaled,
)
from scsdpo.advantage.group_relative import SequenceLevel
from scsdpo.loss import (
    Head,
    HeadGradient,
    NoImportance,
    Objective,
    SamplerImportance,
    SequenceImportance,
    TokenImportance,
    Tokens,
    credit_loss,
)
from scsdpo.loss.signals import Signals
from scsdpo.weighting import PassRate, Uniform

V, LENGTH = 3, 2
REWARD = torch.tensor([[0.0, 1.0, 0.3], [0.7, 0.2, 0.0], [0.1, 0.0, 1.0]], dtype=torch.float64)
NO_CAP = 1e9


def logits(seed):
    """[LENGTH, V]: positions are independent, so that every response can be listed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LENGTH, V, generator=generator, dtype=torch.float64)


def one_response(z, y, advantage, importance, *, sampler, old=None, rewards, teacher=None):
    """The loss of one response y [LENGTH] under rewards [1, 2]: its own and a sibling's."""
    ids = torch.tensor(y)

    def logprobs(table):
        return table.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    signals = Signals.unmeasured(
        mask,
        mask.any(-1),
        logprobs(sampler).expand(2, -1),
        torch.full((2, LENGTH), torch.nan) if old is None else logprobs(old).expand(2, -1),
    )
    signals.student_logprob.copy_(logprobs(z.detach()))
    table = {"ids": ids.expand(1, 2, -1), "sampled": mask[None]}
    table |= dict.fromkeys(("sampling_logprobs", "policy_logprobs"), torch.zeros(1, 2, LENGTH))
    plan = advantage.plan(of_rewards(rewards, **table), torch.ones(1, 2, dtype=torch.bool))
    for make in (*advantage.derivations, *importance.derivations):
        signals.derive(make)
    batch = Tokens(
        ids=ids,
        places=torch.arange(LENGTH),
        rollouts=[0] * LENGTH,
        scale=torch.ones(LENGTH, dtype=torch.float64),
        weight=torch.ones(LENGTH, dtype=torch.float64),
        signals=signals,
    )
    head = identity_head(V)
    target = teacher_output(z.detach() if teacher is None else teacher, head)
    objective = Objective(
        credit=plan.credit,
        importance=importance.weigh,
        teacher=target,
        reference=target,
        temperature=1.0,
    )
    gradient = HeadGradient(1)
    return credit_loss(
        z, head, Head.of(head), tokens=batch, objective=objective, gradient=gradient
    ).loss


def expected_gradient(z, draw, advantage, importance, **tables):
    """sum_y draw(y) d loss(y) / dz over every response."""
    total = torch.zeros_like(z)
    probs = draw.softmax(-1)
    for y in product(range(V), repeat=LENGTH):
        rewards = torch.tensor([[REWARD[y], 0.0]])  # the sibling's 0 is the baseline
        loss = one_response(z, y, advantage, importance, rewards=rewards, **tables)
        weight = torch.stack([probs[t, y[t]] for t in range(LENGTH)]).prod()
        total += weight * torch.autograd.grad(loss, z)[0]
    return total


def true_gradient(z):
    """d E_S[reward] / dz, negated: a loss."""
    probs = z.softmax(-1)
    value = -torch.einsum("a,b,ab->", probs[0], probs[1], REWARD)
    return torch.autograd.grad(value, z)[0]


POLICY_GRADIENT = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled())


def test_sequence_weights_make_another_samplers_responses_unbiased():
    z, mu = logits(0).requires_grad_(), logits(1)
    importance = SequenceImportance(cap=NO_CAP)
    ours = expected_gradient(z, mu, POLICY_GRADIENT, importance, sampler=mu)
    torch.testing.assert_close(ours, true_gradient(z), rtol=1e-6, atol=1e-8)
    biased = expected_gradient(z, mu, POLICY_GRADIENT, NoImportance(), sampler=mu)
    assert not torch.allclose(biased, true_gradient(z), atol=1e-2)


def test_weights_are_one_where_sampler_and_trainer_agree():
    z = logits(0).requires_grad_()
    expected = expected_gradient(z, z.detach(), POLICY_GRADIENT, NoImportance(), sampler=z.detach())
    torch.testing.assert_close(expected, true_gradient(z), rtol=1e-6, atol=1e-8)
    for importance in (TokenImportance(), SamplerImportance(), SequenceImportance()):
        ours = expected_gradient(z, z.detach(), POLICY_GRADIENT, importance, sampler=z.detach())
        torch.testing.assert_close(ours, expected)


def test_token_weights_make_per_token_divergences_unbiased_at_each_position():
    """With independent positions the reverse KL's estimator needs each token's own weight only."""
    z, mu, target = logits(0).requires_grad_(), logits(1), logits(2)
    advantage = SelfDistillation(divergence=Divergence(alpha=1.0), support=Sampled())
    ours = expected_gradient(
        z, mu, advantage, SamplerImportance(cap=NO_CAP), sampler=mu, teacher=target
    )
    s, t = z.log_softmax(-1), target.log_softmax(-1)
    kl = (s.exp() * (s - t)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(kl, z)[0])


@pytest.mark.parametrize("importance", [SamplerImportance, SequenceImportance])
def test_in_later_updates_the_samplers_weight_stays_and_the_ratio_moves(importance):
    """w = min(old / rollout, cap) beside PPO's rho = current / old: no ratio counts twice."""
    z, old, mu = logits(0).requires_grad_(), logits(3), logits(1)
    advantage = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled(), clip_low=1.0, clip_high=1e9)
    y, rewards = (1, 2), torch.tensor([[1.0, 0.0]])
    loss = one_response(z, y, advantage, importance(cap=1.5), sampler=mu, old=old, rewards=rewards)
    at = torch.tensor(y)[:, None]
    now, before, drawn = (x.log_softmax(-1).gather(-1, at)[:, 0] for x in (z, old, mu))
    weight = (before - drawn).exp()
    if importance is SequenceImportance:
        weight = weight.prod().expand(LENGTH)
    expected = -(weight.clamp(max=1.5) * (now - before).exp()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, expected)))


def learned(steps, rate=1.0):
    """The policies of a run of exact policy gradient: the first, and after each of its steps."""
    tables = [logits(0)]
    for _ in range(steps):
        z = tables[-1].clone().requires_grad_()
        tables.append((z - rate * true_gradient(z)).detach())
    return tables


def drew(policies, ages):
    """[LENGTH, V]: position t is drawn by the weights of `ages[t]` steps before the last."""
    return torch.stack([policies[-1 - age][t] for t, age in enumerate(ages)])


AGES = [(1, 1), (2, 2), (4, 4), (4, 1), (2, 0)]
"""Of the first and of the second token; those that differ: weights changed within responses."""


def relative_bias(z, mu, importance):
    """|E[gradient] - on-policy gradient| / |on-policy gradient|, exactly."""
    ours = expected_gradient(z, mu, POLICY_GRADIENT, importance, sampler=mu)
    own = z.detach()
    exact = expected_gradient(z, own, POLICY_GRADIENT, NoImportance(), sampler=own)
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("ages", AGES)
def test_with_the_exact_sequence_ratio_old_samples_give_the_on_policy_gradient(ages):
    """sum_y mu(y) w(y) g(y) = sum_y S(y) g(y), where w = S / mu, whichever weights drew a token."""
    policies = learned(4)
    z, mu = policies[-1].clone().requires_grad_(), drew(policies, ages)
    assert relative_bias(z, mu, SequenceImportance(cap=float("inf"))) < 1e-12
    assert relative_bias(z, mu, NoImportance()) > 0.02


def test_what_truncation_costs_is_bias_that_grows_with_age_and_falls_with_the_cap():
    """The figures of docs/ahead.md, at ages 1, 2, 4 of a policy that learns fast."""
    policies = learned(4)
    z = policies[-1].clone().requires_grad_()
    ages = [drew(policies, (age, age)) for age in (1, 2, 4)]
    measured = {
        SequenceImportance: [
            [0.1731, 0.3160, 0.5235],
            [0.0000, 0.1007, 0.3663],
            [0.0000, 0.0029, 0.2054],
            [0.0000, 0.0000, 0.0137],
        ],
        SamplerImportance: [
            [0.1685, 0.3022, 0.4914],
            [0.0773, 0.1612, 0.3897],
            [0.0773, 0.1448, 0.2901],
            [0.0773, 0.1448, 0.2538],
        ],
    }
    for kind, table in measured.items():
        ours = torch.tensor(
            [[relative_bias(z, mu, kind(cap=cap)) for mu in ages] for cap in (1.0, 1.25, 1.5, 2.0)]
        )
        torch.testing.assert_close(ours, torch.tensor(table), atol=6e-5, rtol=0)
        assert (ours.diff(dim=0) <= 1e-6).all() and (ours.diff(dim=1) >= -1e-6).all()
    none = torch.tensor([relative_bias(z, mu, NoImportance()) for mu in ages])
    torch.testing.assert_close(none, torch.tensor([0.1803, 0.3233, 0.5241]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("ages", AGES)
@pytest.mark.parametrize("reward", [1.0, 0.0])
@pytest.mark.parametrize("y", [(1, 2), (0, 0), (2, 1)])
def test_group_relative_with_sampler_importance_is_decoupled_ppo(ages, reward, y):
    """-sum_t min(S_old / S_behaviour, cap) min(u A, clip(u, 1 - eps, 1 + eps) A), u = S / S_old.

    `old` is the policy before the batch's first update, behaviour the weights that drew the token.
    """
    policies = learned(4)
    old, mu = policies[-1], drew(policies, ages)
    z = (old + 2 * (logits(5) - logits(6))).requires_grad_()  # later updates on the batch
    low, high, cap = 0.2, 0.28, 1.3
    advantage = GroupRelative(
        baseline=LeaveOneOut(), scale=Unscaled(), clip_low=low, clip_high=high
    )
    rewards = torch.tensor([[reward, 1 - reward]])
    importance = SamplerImportance(cap=cap)
    loss = one_response(z, y, advantage, importance, sampler=mu, old=old, rewards=rewards)
    at = torch.tensor(y)[:, None]
    now, before, drawn = (x.log_softmax(-1).gather(-1, at)[:, 0] for x in (z, old, mu))
    weight, ratio, a = (before - drawn).exp().clamp(max=cap), (now - before).exp(), 2 * reward - 1
    inner = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    expected = -(weight * inner).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, expected)))


@pytest.mark.parametrize("reward", [1.0, 0.0])
def test_a_sequence_ratio_is_gspos_gradient(reward):
    """-min(s A, clip(s) A), s = (S(y) / S_old(y)) ** (1 / T), under SequenceMean."""
    z, old = logits(0).requires_grad_(), logits(3)
    advantage = GroupRelative(
        baseline=LeaveOneOut(), scale=Unscaled(), clip_low=0.9, clip_high=9.0, level=SequenceLevel()
    )
    y, rewards = (1, 2), torch.tensor([[reward, 1 - reward]])
    loss = one_response(z, y, advantage, NoImportance(), sampler=old, old=old, rewards=rewards)
    at = torch.tensor(y)[:, None]
    now, before = (x.log_softmax(-1).gather(-1, at)[:, 0] for x in (z, old))
    a, ratio = 2 * reward - 1, (now - before).mean().exp()
    expected = -torch.minimum(ratio * a, ratio.clamp(0.1, 10) * a)
    torch.testing.assert_close(loss / LENGTH, expected)
    ours, theirs = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(ours / LENGTH, theirs)


@pytest.mark.parametrize("weighting", [Uniform(), PassRate(), PassRate(power=1.0)], ids=repr)
def test_a_weighted_estimator_is_unbiased_for_the_weighted_divergence(weighting):
    """sum_j W_j E_y[gradient] = d (sum_j W_j KL_j) / dz, one question with k = 1 and one with 2."""
    successes = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]])
    weights = weighting.weigh(of_rewards(successes))[:, 0]
    advantage = SelfDistillation(divergence=Divergence(alpha=1.0), support=Sampled())
    students = [logits(seed).requires_grad_() for seed in (0, 1)]
    targets = [logits(seed) for seed in (2, 3)]
    total = torch.zeros((), dtype=torch.float64)
    for weight, z, target in zip(weights, students, targets, strict=True):
        s, t = z.log_softmax(-1), target.log_softmax(-1)
        total = total + weight * (s.exp() * (s - t)).sum()
        ours = weight * expected_gradient(
            z, z.detach(), advantage, NoImportance(), sampler=z.detach(), teacher=target
        )
        exact = torch.autograd.grad(total, z, retain_graph=True)[0]
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("kind", [TokenImportance, SamplerImportance, SequenceImportance])
def test_a_cap_that_is_not_positive_is_refused(kind):
    with pytest.raises(ValueError, match=rf"`{kind.__name__}\(cap=...\)` must be > 0, got 0"):
        kind(cap=0.0)
