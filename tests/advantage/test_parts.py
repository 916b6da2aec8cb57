"""The parts of which methods are made: how they reduce to each other, and their gradients."""

import pytest
import torch

from formulas import rhythm
from scsdpo.advantage import (
    Blend,
    Divergence,
    DivergenceMix,
    EntropyBonus,
    Failed,
    GroupRelative,
    LogitMix,
    Never,
    PriorAtForks,
    Rhythm,
    Route,
    Routed,
    SelfDistillation,
    SignAgreement,
    Succeeded,
    Surprise,
    TeacherRatio,
    Trusted,
    Weighted,
)
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
    Overlong,
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

    def weigh(self, judged):
        p = judged.pass_rates[:, None]
        return (p * (1 - p) ** 2).expand_as(judged.rewards)


class _Looped(Surprise):
    """`Rhythm` by the plain loops of the formulas."""

    def __init__(self, **arguments):
        self.__dict__.update(vars(Surprise()), arguments=arguments)

    needs = property(lambda self: frozenset({"student_entropy", "teacher_entropy"}))

    def factor(self, chunk, advantage):
        signals = chunk.signals
        table = torch.zeros_like(signals.student_entropy)
        for row, mask in enumerate(signals.mask):
            pair = (
                h[row][mask].tolist() for h in (signals.student_entropy, signals.teacher_entropy)
            )
            table[row][mask] = torch.tensor(rhythm(*pair, **self.arguments), dtype=table.dtype)
        return 1 + chunk.at(table) * (super().factor(chunk, advantage) - 1)


def step(**strategies):
    """Loss and gradient of one step on the table policy, its teacher a little behind."""
    settings = {"advantage": JSD, "teacher": Frozen()} | strategies
    policy = TablePolicy()
    model = PolicyOptimizer(policy, sampling=Sampling(n=G), **settings)
    model.configure_model()
    with torch.no_grad():
        noise = torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(1))
        policy.table += 0.3 * noise.double()
    return one_step(model, judged())


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
    "all responses ended: filtering = none": ({"token_weighting": Overlong()}, {}),
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
    "a sign agreement that keeps all = unmodulated": (
        {"advantage": GroupRelative(modulator=SignAgreement(otherwise=1))},
        PG,
    ),
    "trust in every group = no gate": (
        {"advantage": Trusted(advantage=JSD, threshold=-99.0, unmeasured=1.0)},
        {},
    ),
    "a surprise of sharpness 0 = unmodulated": (
        {"advantage": GroupRelative(modulator=Surprise(sharpness=0))},
        PG,
    ),
    "a rhythm of sharpness 0 = unmodulated": (
        {"advantage": GroupRelative(modulator=Rhythm(sharpness=0))},
        PG,
    ),
    "a rhythm whose windows are one token at most = its formula": (
        {"advantage": GroupRelative(modulator=Rhythm(window=1))},
        {"advantage": GroupRelative(modulator=_Looped(window=1))},
    ),
}


@pytest.mark.parametrize("claim", SAME)
def test_limits_of_one_part_are_another(claim):
    special, general = SAME[claim]
    assert_equal(step(**special), step(**general))


def test_sc_sdpo_of_power_to_zero_drops_degenerate_questions(tmp_path):
    near = {"class_path": "PassRate", "init_args": {"power": 1e-12}}
    limit = one_step(method("sdpo-drop-degenerate", tmp_path), judged())
    assert_equal(one_step(method("sc-sdpo", tmp_path, weighting=near), judged()), limit, 1e-10)


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
    given, available = judged(), torch.ones(4, G, dtype=torch.bool)
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
