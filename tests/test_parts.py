"""The parts of which methods are made: how they reduce to each other, and their gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_inputs import run, tokens
from oracle import divergence, supported
from scsdpo.advantage import (
    K1,
    K2,
    K3,
    Blend,
    Divergence,
    DivergenceMix,
    EntropyBonus,
    Failed,
    Full,
    GroupRelative,
    LogitMix,
    Never,
    PriorAtForks,
    ReferenceKL,
    Route,
    Routed,
    SelfDistillation,
    SquaredFisherRao,
    SquaredHellinger,
    Succeeded,
    Surprise,
    TeacherRatio,
    TopK,
    Weighted,
)
from scsdpo.loss import TokenLogits
from scsdpo.loss.signals import Signals
from scsdpo.reduction import TokenMean
from scsdpo.state import Constant
from scsdpo.teacher import (
    EMA,
    Frozen,
    NoTeacher,
    PlainPrompt,
    Restart,
    TrustRegion,
)
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Sampling
from scsdpo.weighting import (
    HardFilter,
    PassRate,
    Position,
    Product,
    RatePower,
    TeacherEntropy,
    Uniform,
    Weighting,
)
from table_policy import G, TablePolicy, judged
from test_methods import module as method
from test_methods import one_step

JSD = SelfDistillation()


class _Cubic(Weighting):
    """W_j = p_j (1 - p_j)^2."""

    def weigh(self, outcomes):
        p = outcomes.pass_rates[:, None]
        return (p * (1 - p) ** 2).expand_as(outcomes.rewards)


def step(**strategies):
    """Loss and gradient of one step on the table policy, its teacher a little behind."""
    settings = {"advantage": JSD, "teacher": Frozen()} | strategies
    policy = TablePolicy()
    model = PolicyOptimizer(policy, sampling=Sampling(n=G), **settings)
    model.configure_model()
    with torch.no_grad():
        noise = torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(1))
        policy.table += 0.3 * noise.double()
    return one_step(model)


def assert_equal(first, second, tolerance=1e-12):
    assert first[1].abs().max() > 1e-7
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- identities

PG = {"advantage": GroupRelative(), "teacher": NoTeacher()}
SAME = {
    "the mix of a trust region at 0 = frozen": ({"teacher": TrustRegion(mix=0.0)}, {}),
    "a logit mix of share 1 = as taught": (
        {"advantage": SelfDistillation(target=LogitMix(share=Constant(1.0)))},
        {},
    ),
    "a divergence mix of sharpness 0 = as taught": (
        {"advantage": SelfDistillation(target=DivergenceMix(sharpness=0))},
        {},
    ),
    "a prior at no forks = as taught": (
        {
            "advantage": SelfDistillation(target=PriorAtForks(fork_share=0)),
            "reference": Frozen(context=PlainPrompt()),
        },
        {},
    ),
    "a clip above every summand = none": (
        {"advantage": SelfDistillation(divergence=Divergence(summand_clip=99.0))},
        {},
    ),
    "a floor of 1 = uniform tokens": ({"token_weighting": Position(floor=1.0)}, {}),
    "a filter that keeps all = uniform": ({"weighting": HardFilter(low=0, high=1)}, {}),
    "a product with uniform = its other factor": (
        {"weighting": Product(factors=(Uniform(), PassRate()))},
        {"weighting": PassRate()},
    ),
    "one route for all = its advantage": (
        {"advantage": Routed(routes=(Route(advantage=JSD),))},
        {},
    ),
    "what an earlier route claims is not a later one's": (
        {
            "advantage": Routed(
                routes=(Route(advantage=JSD), Route(advantage=GroupRelative(), weight=5))
            )
        },
        {},
    ),
    "a route of weight w = a blend of weight w": (
        {"advantage": Routed(routes=(Route(advantage=JSD, weight=0.3),))},
        {"advantage": Blend(parts=(Weighted(advantage=JSD, weight=0.3),))},
    ),
    "a power of 0 = uniform": ({"weighting": RatePower()}, {}),
    "a power of the pass rate = its formula": (
        {"weighting": RatePower(solved=1, failed=2)},
        {"weighting": _Cubic()},
    ),
    "the weighting of the only part = the weighting of all": (
        {"advantage": Blend(parts=(Weighted(advantage=JSD, weight=0.3, weighting=PassRate()),))},
        {
            "advantage": Blend(parts=(Weighted(advantage=JSD, weight=0.3),)),
            "weighting": PassRate(),
        },
    ),
    "the weighting of the only route = the weighting of all": (
        {"advantage": Routed(routes=(Route(advantage=JSD, weighting=_Cubic()),))},
        {"weighting": _Cubic()},
    ),
    "a weighting of every part = the weighting of all": (
        {
            "advantage": Blend(
                parts=(
                    Weighted(advantage=JSD, weight=0.3, weighting=PassRate()),
                    Weighted(advantage=GroupRelative(), weighting=PassRate()),
                )
            )
        },
        {
            "advantage": Blend(
                parts=(Weighted(advantage=JSD, weight=0.3), Weighted(advantage=GroupRelative()))
            ),
            "weighting": PassRate(),
        },
    ),
    "routes by outcome add up to the whole": (
        {
            "advantage": Routed(
                routes=(
                    Route(advantage=JSD, where=Failed()),
                    Route(advantage=JSD, where=Succeeded()),
                )
            )
        },
        {},
    ),
    "a teacher ratio of mix 0 = unmodulated": (
        {"advantage": GroupRelative(modulator=TeacherRatio(mix=0))},
        PG,
    ),
    "a surprise of sharpness 0 = unmodulated": (
        {"advantage": GroupRelative(modulator=Surprise(sharpness=0))},
        PG,
    ),
}


@pytest.mark.parametrize("claim", SAME)
def test_limits_of_one_part_are_another(claim):
    special, general = SAME[claim]
    assert_equal(step(**special), step(**general))


def test_sc_sdpo_of_power_to_zero_drops_degenerate_questions(tmp_path):
    near = {"class_path": "PassRate", "init_args": {"power": 1e-12}}
    limit = one_step(method("sdpo-drop-degenerate", tmp_path))
    assert_equal(one_step(method("sc-sdpo", tmp_path, weighting=near)), limit, 1e-10)


@pytest.mark.parametrize(("share", "other"), [(1.0, "grpo-no-norm"), (0.0, "sdpo")])
def test_the_hybrid_at_its_ends_is_its_parts(tmp_path, share, other):
    mixed = method("sdpo-hybrid", tmp_path)
    first, second = mixed.advantage.parts
    parts = (
        Weighted(advantage=first.advantage, weight=share),
        Weighted(advantage=second.advantage, weight=1 - share),
    )
    blend = {"advantage": Blend(parts=parts)}
    alone = method(other, tmp_path).advantage
    teacher = NoTeacher() if share else EMA()
    assert_equal(step(**blend, teacher=EMA()), step(advantage=alone, teacher=teacher))


def test_a_part_does_not_run_where_its_weighting_is_0_and_the_others_do(tmp_path):
    """SDPO teaches the successes of a mastered question; weighted by its pass rate it does not."""
    given, available = judged()[1], torch.ones(4, G, dtype=torch.bool)
    informative = torch.tensor([[True], [False], [False], [True]]).expand(4, G)
    parts = (
        Weighted(advantage=EntropyBonus()),
        Weighted(advantage=JSD, weighting=PassRate()),
    )
    plan = Blend(parts=parts).plan(given, available)
    assert torch.equal(plan.needs_teacher, informative) and plan.active.all()
    plan = method("sc-hybrid", tmp_path).advantage.plan(given, available)
    assert torch.equal(plan.needs_teacher, informative) and torch.equal(plan.active, informative)


def test_srpo_routed_to_never_is_grpo(tmp_path):
    never = Routed(routes=(Route(advantage=JSD, where=Never()), Route(advantage=GroupRelative())))
    settings = {"token_weighting": TeacherEntropy(), "reduction": TokenMean(over="active")}
    assert_equal(step(advantage=never, **settings), step(**PG, reduction=TokenMean(over="active")))


def test_the_credit_of_srpos_correct_rollouts_is_grpos(tmp_path):
    """With the distilled rollouts' weight taken away, what is left is GRPO's."""
    srpo = method("srpo", tmp_path).advantage
    distilled, rest = srpo.routes
    only = Routed(
        routes=(
            Route(advantage=distilled.advantage, where=distilled.where, weight=0.0),
            rest,
        )
    )
    # SRPO distils the failures of questions 0 and 3; the successes of both remain.
    kept = Routed(routes=(Route(advantage=rest.advantage, where=Succeeded()),))
    assert_equal(step(advantage=only), step(advantage=kept, teacher=NoTeacher()))


def test_a_restart_of_every_step_is_an_average_and_of_ten_waits_ten():
    for every, rate, steps in ((1, 0.3, 3), (10, 1.0, 10)):
        policy = TablePolicy()
        teachers = EMA(rate=rate), Restart(every=every, rate=rate)
        for teacher in teachers:
            teacher.configure(policy, "teacher")
        average, restart = teachers
        start = policy.table.detach().clone()
        for n in range(1, steps + 1):
            with torch.no_grad():
                policy.table += 1
            average.after_step(policy)
            restart.after_step(policy)
            ours = restart.weights.table
            expected = average.weights.table if every == 1 else start + (10 if n == 10 else 0)
            torch.testing.assert_close(ours, expected)


# -------------------------------------------------------------------------------- gradients


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
    signals = Signals.unmeasured(mask, torch.zeros(2, 4), torch.zeros(2, 4))
    weights = Position(floor=0.2, centre=0.5, width=0.1).weigh(signals, mask)
    # at t / T = 1/2 the sigmoid is a half
    assert weights[0, 1].item() == weights[1, 0].item() == pytest.approx(0.2 + 0.8 / 2)
    assert (weights[0].diff() > 0).all() and 0.2 < weights[0, 0] < weights[0, 3] < 1
