"""Advantages, weightings, reductions: closed forms, limits, and the laws that all obey."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_inputs import of_rewards
from scsdpo.advantage import (
    BatchStd,
    Blend,
    Divergence,
    Full,
    GroupMean,
    GroupPassRate,
    GroupRelative,
    GroupStd,
    LeaveOneOut,
    ReferenceAnchor,
    Sampled,
    SelfDistillation,
    SequenceLevel,
    TopK,
    Unscaled,
    Weighted,
)
from scsdpo.loss.signals import Signals
from scsdpo.reduction import SequenceMean, TokenMean, TokenSum
from scsdpo.weighting import PassRate, TeacherEntropy, Uniform, UniformTokens, pass_rate

G = 8
ADVANTAGES = [
    GroupRelative(),
    GroupRelative(baseline=LeaveOneOut(), scale=Unscaled(), level=SequenceLevel()),
    GroupRelative(scale=BatchStd()),
    GroupRelative(scale=GroupPassRate()),
    SelfDistillation(),
    SelfDistillation(divergence=Divergence(alpha=1), support=Sampled()),
    ReferenceAnchor(support=Full()),
    Blend(parts=(Weighted(advantage=GroupRelative()), Weighted(advantage=SelfDistillation()))),
]


def binary(*successes):
    """One question per count, the first k of G rollouts right."""
    return torch.stack([(torch.arange(G) < k).float() for k in successes])


@pytest.mark.parametrize("k", range(G + 1))
@pytest.mark.parametrize(
    ("scale", "total"),
    [
        # sum_i |A_i| of k ones and G - k zeros: k |1 - p| + (G - k) |p| = 2 G p (1 - p), divided
        # by the population std sqrt(p (1 - p)), by one, or by the pass rate p.
        (GroupStd(ddof=0, eps=0), lambda p: 2 * G * (p * (1 - p)) ** 0.5),
        (GroupStd(ddof=1, eps=0), lambda p: 2 * G * (p * (1 - p) * (G - 1) / G) ** 0.5),
        (Unscaled(), lambda p: 2 * G * p * (1 - p)),
        (GroupPassRate(), lambda p: 2 * G * (1 - p) if p else 0),
    ],
    ids=["population", "sample", "dr-grpo", "maxrl"],
)
def test_total_advantage_of_a_question_has_its_closed_form(k, scale, total):
    advantages = GroupRelative(baseline=GroupMean(), scale=scale).advantages(binary(k))
    assert advantages.abs().sum().item() == pytest.approx(total(k / G), abs=1e-12)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    ours = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled()).advantages(rewards)
    # 1 - (0 + .5)/2, 0 - (1 + .5)/2, .5 - (1 + 0)/2
    torch.testing.assert_close(ours, torch.tensor([[0.75, -0.75, 0.0]], dtype=torch.float64))


def test_batch_std_is_one_scale_for_all_questions():
    rewards = binary(4, 8, 1)
    centred = rewards.double() - rewards.double().mean(-1, keepdim=True)
    ours = GroupRelative(scale=BatchStd(eps=0)).advantages(rewards)
    torch.testing.assert_close(ours, centred / centred.std(correction=0))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.sampled_from(range(4)))
def test_equal_rewards_give_exactly_zero_advantage(rewards, which):
    scale = [GroupStd(), Unscaled(), GroupPassRate(), BatchStd()][which]
    same = torch.full((2, len(rewards)), rewards[0])
    plan = GroupRelative(scale=scale).plan(of_rewards(same), torch.zeros(2, len(rewards)).bool())
    if not isinstance(scale, Unscaled):  # there a float mean may differ from its equal terms
        assert not plan.active.any()


def test_pass_rate_weights_are_the_papers():
    # sqrt(p (1 - p)) at G = 8, k = 1..4: .331 .433 .484 .500 (METHODS in docs/methods.md)
    weights = PassRate(power=0.5).weigh(of_rewards(binary(1, 2, 3, 4)))[:, 0]
    raw = torch.tensor([7.0, 12, 15, 16], dtype=torch.float64).sqrt() / 8
    torch.testing.assert_close(weights, raw / raw.mean())
    assert raw.tolist() == pytest.approx([0.331, 0.433, 0.484, 0.5], abs=5e-4)


@given(
    st.lists(st.integers(0, G), min_size=1, max_size=12),
    st.floats(0, 4),
)
def test_pass_rate_weights_average_to_one_over_informative_questions(counts, power):
    weights = PassRate(power=power).weigh(of_rewards(binary(*counts)))
    informative = torch.tensor([0 < k < G for k in counts])
    assert (weights[~informative] == 0).all()
    assert weights.shape == (len(counts), G)
    if informative.any():
        assert weights[informative].mean().item() == pytest.approx(1)


def test_pass_rate_weights_are_normalised_over_the_questions_of_all_ranks(monkeypatch):
    """On a part, too: two ranks of two questions each have the weights of one with four."""
    part = Weighted(advantage=GroupRelative(), weight=0.5, weighting=PassRate())
    counts, sums = (1, 4, 0, 2), []
    whole = part.coefficients(of_rewards(binary(*counts)))
    monkeypatch.setattr(pass_rate, "all_sum", lambda value: sums.append(value) or value)
    ranks = [of_rewards(binary(*counts[:2])), of_rewards(binary(*counts[2:]))]
    alone = torch.cat([part.coefficients(rank) for rank in ranks])
    monkeypatch.setattr(pass_rate, "all_sum", lambda value: sum(sums))
    together = torch.cat([part.coefficients(rank) for rank in ranks])
    torch.testing.assert_close(together, whole)
    assert (alone - whole).abs().max() > 0.01


def test_power_zero_drops_degenerate_questions_and_weighs_the_rest_equally():
    weights = PassRate(power=0).weigh(of_rewards(binary(0, 1, 4, 8)))
    assert weights[:, 0].tolist() == [0, 1, 1, 0]


def test_power_to_zero_converges_to_power_zero():
    counts = binary(0, 1, 4, 7, 8)
    near = PassRate(power=1e-9).weigh(of_rewards(counts))
    torch.testing.assert_close(near, PassRate(power=0).weigh(of_rewards(counts)), rtol=0, atol=1e-8)


def test_a_batch_without_informative_questions_weighs_nothing():
    assert (PassRate().weigh(of_rewards(binary(0, 8, 0))) == 0).all()


def test_teacher_entropy_averages_to_one_over_distilled_tokens():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    signals = Signals.unmeasured(
        mask, mask.any(-1), torch.zeros(mask.shape), torch.zeros(mask.shape)
    )
    signals.teacher_entropy.copy_(torch.tensor([[0.0, 1.0, 2.0], [5.0, 9.0, 9.0]]))
    distilled = mask & torch.tensor([[True], [False]])
    weights = TeacherEntropy(beta=1).weigh(signals, distilled)
    # exp(0), exp(-1), exp(-2) over their mean; the others stay at 1
    raw = torch.exp(-torch.tensor([0.0, 1, 2], dtype=torch.float64))
    torch.testing.assert_close(weights[0], raw / raw.mean())
    assert weights[1].tolist() == [1, 1, 1]
    torch.testing.assert_close(
        TeacherEntropy(beta=0).weigh(signals, distilled), UniformTokens().weigh(signals, distilled)
    )


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # lengths 2, 3, 5, of which the first two are active
        (TokenMean(over="all"), [1 / 10] * 3),
        (TokenMean(over="active"), [1 / 5] * 3),
        (SequenceMean(over="all"), [1 / 6, 1 / 9, 1 / 15]),
        (SequenceMean(over="active"), [1 / 4, 1 / 6, 1 / 10]),
        (TokenSum(constant=100), [1 / 300] * 3),
    ],
)
def test_reductions_have_their_closed_form(reduction, expected):
    ours = reduction.coefficients(torch.tensor([2, 3, 5]), torch.tensor([True, True, False]))
    assert ours.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(over="active"), TokenSum(constant=5)]
)
def test_reductions_stay_finite_without_tokens_or_active_rollouts(reduction):
    ours = reduction.coefficients(torch.tensor([0, 0]), torch.tensor([False, False]))
    assert ours.isfinite().all()


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_every_advantage_is_picklable_and_leaves_verdicts_unmodified(advantage):
    judged = of_rewards(binary(3, 0))
    before = judged.rewards.clone()
    available = torch.ones(2, G, dtype=torch.bool)
    plan = pickle.loads(pickle.dumps(advantage)).plan(judged, available)
    for mask in (plan.active, plan.needs_teacher, plan.needs_reference):
        assert mask.shape == (2, G) and mask.dtype == torch.bool
    assert not (plan.needs_teacher & ~plan.active).any()
    assert advantage.needs_teacher or not plan.needs_teacher.any()
    assert advantage.needs_reference or not plan.needs_reference.any()
    torch.testing.assert_close(judged.rewards, before, rtol=0, atol=0)
    assert available.all()


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=repr)
def test_no_advantage_asks_a_teacher_that_is_not_there(advantage):
    plan = advantage.plan(of_rewards(binary(3, 0)), torch.zeros(2, G, dtype=torch.bool))
    assert not plan.needs_teacher.any()


@pytest.mark.parametrize("weighting", [Uniform(), PassRate(), PassRate(power=1)], ids=repr)
def test_every_weighting_is_nonnegative_and_picklable(weighting):
    weights = pickle.loads(pickle.dumps(weighting)).weigh(of_rewards(binary(0, 3, 8)))
    assert weights.dtype == torch.float64 and weights.shape == (3, G) and (weights >= 0).all()
    assert copy.deepcopy(weighting) == weighting


def test_uniform_weights_are_one():
    assert (Uniform().weigh(of_rewards(binary(0, 3))) == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PassRate(power=-1), r"`PassRate\(power=...\)` must be >= 0, got -1"),
        (lambda: GroupStd(ddof=2), r"`GroupStd\(ddof=...\)` must be 0 or 1, got 2"),
        (lambda: GroupStd(eps=-1), r"`GroupStd\(eps=...\)`"),
        (lambda: BatchStd(eps=-1), r"`BatchStd\(eps=...\)`"),
        (lambda: GroupRelative(clip_low=2), r"`GroupRelative\(clip_low=...\)` must be in \[0, 1\]"),
        (lambda: GroupRelative(clip_high=-1), r"`GroupRelative\(clip_high=...\)`"),
        (lambda: Divergence(alpha=2), r"`Divergence\(alpha=...\)` must be in \[0, 1\]"),
        (
            lambda: SelfDistillation(support=Sampled()),
            "set divergence.alpha to 1 .* got Divergence.alpha=0.5",
        ),
        (lambda: TopK(k=0), r"`TopK\(k=...\)` must be >= 1, got 0"),
        (lambda: Blend(parts=()), "at least one advantage"),
        (lambda: TokenSum(constant=0), r"`TokenSum\(constant=...\)` must be > 0"),
        (lambda: TeacherEntropy(beta=-1), r"`TeacherEntropy\(beta=...\)`"),
    ],
)
def test_bad_arguments_name_class_argument_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
