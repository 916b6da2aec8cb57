"""Objectives, targets and token weights: closed forms, enumeration, and autograd in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulas import rhythm
from kernel_inputs import run, tokens
from oracle import divergence, supported
from scsdpo.advantage import (
    K1,
    K2,
    K3,
    Divergence,
    DivergenceMix,
    EntropyBonus,
    Full,
    LogitMix,
    ReferenceKL,
    Rhythm,
    SelfDistillation,
    SquaredFisherRao,
    SquaredHellinger,
    TopK,
)
from scsdpo.loss import TokenLogits
from scsdpo.loss.signals import Signals
from scsdpo.state import Constant
from scsdpo.weighting import (
    Overlong,
    Position,
)


@given(
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    view=st.sampled_from(["full", "top", "top+tail"]),
    clip=st.sampled_from([0.01, 0.05, 0.3, 5.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_clipped_summands_equal_autograd(alpha, view, clip, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 7, generator=generator).double() for _ in range(2))
    student.requires_grad_()
    support, k, tail = {
        "full": (Full(), None, False),
        "top": (TopK(k=3, tail=False), 3, False),
        "top+tail": (TopK(k=3), 3, True),
    }[view]
    advantage = SelfDistillation(
        divergence=Divergence(alpha=alpha, summand_clip=clip), support=support
    )
    output = run(advantage, student, teacher, tokens(torch.zeros(4, dtype=torch.long)))
    log_s, log_t = supported(student, teacher, k=k, tail=tail)
    s, t = log_s.exp(), log_t.exp()
    if alpha in (0.0, 1.0):
        terms = t * (log_t - log_s) if alpha == 0 else s * (log_s - log_t)
    else:
        log_m = ((1 - alpha) * s + alpha * t).log()
        terms = (1 - alpha) * s * (log_s - log_m) + alpha * t * (log_t - log_m)
    expected = terms.clamp(max=clip).sum()
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(x, student) for x in (output.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@given(
    geodesic=st.booleans(),
    view=st.sampled_from(["full", "top", "top+tail"]),
    scale=st.sampled_from([1e-2, 1.0, 5.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_hellinger_and_fisher_rao_equal_autograd(geodesic, view, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, noise = (torch.randn(4, 7, generator=generator).double() for _ in range(2))
    student.requires_grad_()
    teacher = student.detach() + scale * noise
    support, k, tail = {
        "full": (Full(), None, False),
        "top": (TopK(k=3, tail=False), 3, False),
        "top+tail": (TopK(k=3), 3, True),
    }[view]
    distance = SquaredFisherRao() if geodesic else SquaredHellinger()
    advantage = SelfDistillation(divergence=distance, support=support)
    output = run(advantage, student, teacher, tokens(torch.zeros(4, dtype=torch.long)))
    s, t = (log.exp() for log in supported(student, teacher, k=k, tail=tail))
    hellinger = (s.sqrt() - t.sqrt()).square().sum(-1) / 2
    # cos(phi) = 1 - H^2, hence phi = 2 arcsin(H / sqrt 2), and d = 2 phi
    expected = (16 * (hellinger / 2).sqrt().asin().square() if geodesic else hellinger).sum()
    torch.testing.assert_close(output.loss, expected, rtol=1e-8, atol=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(x, student) for x in (output.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-11)


def test_hellinger_and_fisher_rao_are_zero_at_equality_and_largest_without_overlap():
    same, apart = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    for distance, most in ((SquaredHellinger(), 1.0), (SquaredFisherRao(), math.pi**2)):
        credit, value = distance.credit(same, same)
        assert value == 0 and (credit == 0).all()
        credit, value = distance.credit(same, apart)
        assert value.item() == pytest.approx(most) and (credit == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_tail_that_float32_rounds_to_zero_on_one_side_stays_finite(alpha):
    """The teacher is certain, the student is not: log S / T of the tail must not be infinite."""
    student, teacher = torch.zeros(1, 5), torch.tensor([[40.0, 0, -1, -2, -3]])
    student.requires_grad_()
    advantage = SelfDistillation(divergence=Divergence(alpha=alpha), support=TopK(k=2))
    output = run(advantage, student, teacher, tokens(torch.tensor([0])))
    output.loss.backward()
    assert output.loss.isfinite() and student.grad.isfinite().all()


def enumerated(advantage, z, target):
    """Mean over y ~ S of the loss and its gradient."""
    loss, gradient = 0.0, torch.zeros_like(z)
    for y, p in enumerate(z.softmax(-1)[0].detach()):
        output = run(advantage, z, target, tokens(torch.tensor([y])))
        loss += p * output.loss.detach()
        gradient += p * torch.autograd.grad(output.loss, z)[0]
    return loss, gradient


@pytest.mark.parametrize(
    ("estimator", "descends", "unbiased"),
    [(K1(), 1.0, True), (K2(), 1.0, False), (K3(), 0.0, True)],
    ids=["k1", "k2", "k3"],
)
def test_kl_estimators_by_enumeration(estimator, descends, unbiased):
    """k1 and k2 descend KL(S || R), k3 as a loss KL(R || S); values of k1 and k3 are unbiased."""
    generator = torch.Generator().manual_seed(3)
    z, reference = (torch.randn(1, 6, generator=generator).double() for _ in range(2))
    z.requires_grad_()
    loss, gradient = enumerated(ReferenceKL(estimator=estimator), z, reference)
    logs = z.log_softmax(-1), reference.log_softmax(-1)
    (expected,) = torch.autograd.grad(divergence(descends, *logs).sum(), z)
    torch.testing.assert_close(gradient, expected)
    kl = divergence(1.0, *logs).sum().detach()
    assert torch.isclose(loss, kl) == unbiased


def test_the_entropy_bonus_equals_autograd_and_raises_entropy():
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
    output = run(EntropyBonus(), z, z.detach(), tokens(torch.tensor([0, 1, 2])))
    log_s = z.log_softmax(-1)
    expected = (log_s.exp() * log_s).sum()
    torch.testing.assert_close(output.loss, expected.detach())
    (ours,) = torch.autograd.grad(output.loss, z)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, z)[0])

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy().sum()

    assert entropy(z - 0.01 * ours) > entropy(z)


def test_targets_between_student_and_teacher_have_their_closed_forms():
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2, 5, generator=generator).double() for _ in range(2))
    chunk = SimpleNamespace(student=TokenLogits(student), teacher=lambda: TokenLogits(teacher))
    s, t = student.softmax(-1), teacher.softmax(-1)
    mixed = LogitMix(share=Constant(0.3)).of(chunk).probs
    expected = s**0.7 * t**0.3
    torch.testing.assert_close(mixed, expected / expected.sum(-1, keepdim=True))
    jsd = divergence(0.5, s.log(), t.log())
    a = (2 * 0.8 * (torch.sigmoid(3 * jsd) - 0.5))[:, None]
    expected = t ** (1 - a) * s**a
    mixed = DivergenceMix(most=0.8, sharpness=3).of(chunk).probs
    torch.testing.assert_close(mixed, expected / expected.sum(-1, keepdim=True))


def test_position_weights_rise_from_the_floor_along_the_response():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    signals = Signals.unmeasured(mask, mask.any(-1), torch.zeros(2, 4), torch.zeros(2, 4))
    weights = Position(floor=0.2, centre=0.5, width=0.1).weigh(signals, mask)
    # at t / T = 1/2 the sigmoid is a half
    assert weights[0, 1].item() == weights[1, 0].item() == pytest.approx(0.2 + 0.8 / 2)
    assert (weights[0].diff() > 0).all() and 0.2 < weights[0, 0] < weights[0, 3] < 1


def rhythm_tables(lengths, seed=0):
    """Random entropies, and zeros behind each response."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    signals = Signals.unmeasured(
        mask, mask.any(-1), torch.zeros(mask.shape), torch.zeros(mask.shape)
    )
    for table in (signals.student_entropy, signals.teacher_entropy):
        drawn = 2 * torch.rand(mask.shape, generator=generator).double()
        table.copy_(torch.where(mask, drawn, 7.0))  # what lies behind a response is not read
    return signals


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"window": 1},
        {"window": 3, "steepness": 4.0, "gain": 2.0, "highest": 3.0},
        {"window": 99},
    ],
)
def test_the_gate_of_rhythm_is_the_papers_formula_in_plain_loops(arguments):
    lengths = (40, 7, 3, 2, 1, 0)
    signals = rhythm_tables(lengths)
    ours = Rhythm(**arguments).gate(signals)
    for row, length in enumerate(lengths):
        tables = signals.student_entropy, signals.teacher_entropy
        pair = (t[row, :length].tolist() for t in tables)
        expected = rhythm(*pair, **arguments) if length else []
        assert ours[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert (ours[row, length:] == 0).all()
    assert 0 < (ours[0] > 0).sum() < 20 and ours.max() <= 1  # the few tokens above the mean


def test_rhythm_opens_at_the_one_token_where_the_teacher_settles_and_the_student_does_not():
    """The teacher is certain from token 3 on, the student never is.

    With a window of 2 the means of H_T before tokens 1 to 4 are 1, 1, 1, 1/2 and those after them
    1/2, 0, 0, 0: drops of 1/2, 1, 1, 1/2. Tokens 0 and 5 lack a side; the student's drops are 0.
    """
    mask = torch.ones(1, 6, dtype=torch.bool)
    signals = Signals.unmeasured(mask, mask.any(-1), torch.zeros(1, 6), torch.zeros(1, 6))
    signals.teacher_entropy.copy_(torch.tensor([[1.0, 1, 1, 0, 0, 0]]))
    signals.student_entropy.fill_(2.0)
    # anchors: the teacher's drop times H_S - H_T = 1, 1, 1, 2, 2, 2
    a = torch.tensor([0, 0.5 * 1, 1.0 * 1, 1.0 * 2, 0.5 * 2, 0], dtype=torch.float64)
    z = (a - a.mean()) / a.std(correction=0)
    raised = 1 + 2 * (torch.sigmoid(z) - 0.5).clamp(min=0)
    expected = ((raised / raised.mean()).clamp(max=1.5) - 1).clamp(min=0) / 0.5
    gate = Rhythm(window=2).gate(signals)[0]
    torch.testing.assert_close(gate, expected)
    assert gate.argmax() == 3 and gate[0] == gate[1] == gate[5] == 0


def test_windows_of_rhythm_hold_tokens_that_were_drawn():
    """What a tool wrote between them has no place, and no entropy that is read."""
    whole = rhythm_tables((12, 12, 12))
    places = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 12, 13, 14, 15, 16]] * 3)
    spread = rhythm_tables((20, 20, 20))
    spread.mask.zero_().scatter_(1, places, True)
    for name in ("student_entropy", "teacher_entropy"):
        getattr(spread, name).fill_(9.0).scatter_(1, places, getattr(whole, name))
    for window in (1, 3):
        ours = Rhythm(window=window).gate(spread)
        expected = torch.zeros_like(ours).scatter(1, places, Rhythm(window=window).gate(whole))
        assert torch.equal(ours, expected) and (ours > 0).any()


def test_equal_entropies_leave_the_gate_of_rhythm_shut():
    signals = rhythm_tables((9, 4))
    signals.teacher_entropy.copy_(signals.student_entropy)
    assert (Rhythm().gate(signals) == 0).all()


def test_overlong_responses_teach_nothing():
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    ended = torch.tensor([False, True])
    signals = Signals.unmeasured(mask, ended, torch.zeros(2, 4), torch.zeros(2, 4))
    assert Overlong().weigh(signals, mask).tolist() == [[0.0] * 4, [1.0] * 4]
