"""The parts of which methods are made: reductions to each other, gradients, memory, refusals."""

import json
import math
import pickle

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_inputs import outcomes, run, tokens
from oracle import divergence, supported
from runs import Toys, data, module, trainer
from scsdpo.advantage import (
    K1,
    K2,
    K3,
    AllOf,
    Blend,
    DivergenceMix,
    EntropyBonus,
    Every,
    Failed,
    Full,
    GroupFailed,
    GroupRelative,
    HasTeacher,
    LogitMix,
    Never,
    RateWithin,
    ReferenceKL,
    Route,
    Routed,
    Sampled,
    SelfDistillation,
    Succeeded,
    Surprise,
    TeacherRatio,
    TopK,
    Warmup,
    Weighted,
)
from scsdpo.errors import ConfigurationError
from scsdpo.history import DecayedBeta, Instant, MovingAverage
from scsdpo.reduction import TokenMean
from scsdpo.schedule import Constant, Ramp
from scsdpo.selection import Everything, InformativePool
from scsdpo.signals import Signals
from scsdpo.state import nested_state
from scsdpo.teacher import (
    EMA,
    Frozen,
    GoldSolution,
    NoTeacher,
    RememberedDemonstration,
    Restart,
    SiblingDemonstration,
    TrustRegion,
)
from scsdpo.types import Sampling
from scsdpo.weighting import (
    FrozenPassRate,
    HardFilter,
    PassRate,
    Position,
    Product,
    TeacherEntropy,
    Uniform,
)
from scsdpo.weighting.frozen import FORMAT, fingerprint
from table_policy import G, TableChat, TablePolicy, judged
from test_methods import module as method
from test_methods import one_step

JSD = SelfDistillation()


def step(**strategies):
    """Loss and gradient of one step on the table policy, its teacher a little behind."""
    from scsdpo.module import PolicyOptimizer

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
    "a clip above every summand = none": ({"advantage": SelfDistillation(summand_clip=99.0)}, {}),
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
    advantage = SelfDistillation(alpha=alpha, support=support, summand_clip=clip)
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


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_tail_that_float32_rounds_to_zero_on_one_side_stays_finite(alpha):
    """The teacher is certain, the student is not: log S / T of the tail must not be infinite."""
    student, teacher = torch.zeros(1, 5), torch.tensor([[40.0, 0, -1, -2, -3]])
    student.requires_grad_()
    advantage = SelfDistillation(alpha=alpha, support=TopK(k=2))
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
    from scsdpo.loss import TokenLogits

    both = TokenLogits(student), TokenLogits(teacher)
    s, t = student.softmax(-1), teacher.softmax(-1)
    mixed = LogitMix(share=Constant(0.3)).of(*both).probs
    expected = s**0.7 * t**0.3
    torch.testing.assert_close(mixed, expected / expected.sum(-1, keepdim=True))
    jsd = divergence(0.5, s.log(), t.log())
    a = (2 * 0.8 * (torch.sigmoid(3 * jsd) - 0.5))[:, None]
    expected = t ** (1 - a) * s**a
    mixed = DivergenceMix(most=0.8, sharpness=3).of(*both).probs
    torch.testing.assert_close(mixed, expected / expected.sum(-1, keepdim=True))


def test_position_weights_rise_from_the_floor_along_the_response():
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    signals = Signals.unmeasured(mask, torch.zeros(2, 4), torch.zeros(2, 4))
    weights = Position(floor=0.2, centre=0.5, width=0.1).weigh(signals, mask)
    # at t / T = 1/2 the sigmoid is a half
    assert weights[0, 1].item() == weights[1, 0].item() == pytest.approx(0.2 + 0.8 / 2)
    assert (weights[0].diff() > 0).all() and 0.2 < weights[0, 0] < weights[0, 3] < 1


# ----------------------------------------------------------------------- routers and memory


def rewarded(*successes, keys=None):
    rewards = torch.stack([(torch.arange(4) < k).float() for k in successes])
    plain = outcomes(rewards)
    names = keys or tuple(f"q{i}" for i in range(len(successes)))
    from dataclasses import replace

    return replace(plain, keys=names)


def test_routers_claim_what_they_say():
    given, available = rewarded(2, 0, 4), torch.zeros(3, 4, dtype=torch.bool)
    available[0] = True
    right = torch.arange(4) < torch.tensor([[2], [0], [4]])
    expected = {
        Every(): torch.ones(3, 4, dtype=torch.bool),
        Never(): torch.zeros(3, 4, dtype=torch.bool),
        Failed(): ~right,
        Succeeded(): right,
        HasTeacher(): available,
        GroupFailed(): torch.tensor([[False], [True], [False]]).expand(3, 4),
        RateWithin(low=0.5, high=0.9): torch.tensor([[True], [False], [False]]).expand(3, 4),
        AllOf(routers=(Failed(), HasTeacher())): ~right & available,
    }
    for router, claims in expected.items():
        assert torch.equal(router.claims(given, available), claims), router


def test_running_pass_rates_have_their_closed_forms():
    average, beta = MovingAverage(follow=0.25), DecayedBeta(prior=1, decay=0.5)
    seen = [rewarded(4, keys=("a",)), rewarded(2, keys=("b",)), rewarded(0, keys=("a",))]
    rates = [(average.observe(o).item(), beta.observe(o).item()) for o in seen]
    # a: 1, then 1 + (0 - 1) / 4. Beta: (1 + 4) / (2 + 4); two batches later 4 / 4 successes are 1.
    assert [r[0] for r in rates] == [1.0, 0.5, 0.75]
    assert [r[1] for r in rates] == pytest.approx([5 / 6, 3 / 6, (1 + 1) / (2 + 1 + 4)])
    assert Instant().observe(seen[1]).tolist() == [0.5]
    everything = DecayedBeta(prior=0, decay=1)
    assert [everything.observe(o).item() for o in seen] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("make", [MovingAverage, DecayedBeta])
def test_running_pass_rates_survive_a_reload(make):
    first, second = make(), make()
    first.observe(rewarded(4, 1))
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    again = rewarded(0, 3)
    assert torch.equal(first.observe(again), second.observe(again))


def test_a_ramp_and_a_warmup_follow_the_steps_taken():
    ramp, warmup = Ramp(start=0.5, end=0.8, steps=3), Warmup(steps=2)
    given, available = rewarded(2), torch.ones(1, 4, dtype=torch.bool)
    values, claims = [], []
    for _ in range(5):
        values.append(ramp.value())
        claims.append(bool(warmup.claims(given, available).all()))
        ramp.after_step()
        warmup.after_step()
    assert values == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.8])
    assert claims == [True, True, False, False, False]


def test_state_is_found_wherever_it_is_nested():
    rates, ramp = DecayedBeta(), Ramp(start=0, end=1, steps=2)
    advantage = Blend(
        parts=(
            Weighted(advantage=SelfDistillation(target=LogitMix(share=ramp))),
            Weighted(
                advantage=Routed(
                    routes=(
                        Route(
                            advantage=GroupRelative(),
                            where=AllOf(routers=(RateWithin(low=0, high=1, rates=rates),)),
                        ),
                    )
                )
            ),
        )
    )
    assert list(nested_state([advantage])) == [ramp, rates]


def test_a_remembered_success_teaches_a_group_without_one_and_survives_a_reload():
    from dataclasses import replace

    chat, (rollouts, right) = TableChat(), judged()
    context = RememberedDemonstration(size=1)
    plain = SiblingDemonstration().render(chat, rollouts, right)
    assert context.render(chat, rollouts, right).ids == plain.ids  # nothing to remember yet
    wrong = replace(right, successes=torch.zeros_like(right.successes))
    reloaded = RememberedDemonstration(size=1)
    reloaded.load_state_dict(pickle.loads(pickle.dumps(context.state_dict())))
    for one in (context, reloaded):
        told = one.render(chat, rollouts, wrong)
        # question 0 succeeded with its rollouts 0 and 1: the last of them is shown to all
        text = SiblingDemonstration().show(chat, rollouts.prompts[0], "response 0 1")
        assert told.ids[0] == (text,) * G
        assert told.available.tolist() == [[True] * 4, [False] * 4, [True] * 4, [True] * 4]


def test_the_gold_solution_is_told_to_every_rollout():
    chat, (rollouts, right) = TableChat(), judged()
    told = GoldSolution().render(chat, rollouts, right)
    text = SiblingDemonstration().show(chat, rollouts.prompts[2], "gold 2")
    assert told.available.all() and told.ids[2] == (text,) * G


# --------------------------------------------------------------------------------- the pool


def test_the_pool_waits_for_informative_groups_and_gives_exactly_its_size():
    pool = InformativePool(questions=3, max_batches=9)
    rollouts, verdicts = judged()
    assert pool.select(rollouts, verdicts) == ()  # questions 0 and 3
    ((joined, result),) = pool.select(rollouts, verdicts)
    assert result.keys == ("toy/0", "toy/3", "toy/0")
    assert torch.equal(joined.ids[1], rollouts.ids[3]) and joined.texts[1] == rollouts.texts[3]
    assert torch.equal(result.rewards[2], verdicts.rewards[0])
    assert pool.groups == []


def test_the_pool_is_used_at_its_cap_even_if_it_is_empty():
    pool = InformativePool(questions=3, max_batches=2)
    rollouts, verdicts = judged()
    from dataclasses import replace

    nothing = replace(verdicts, rewards=torch.zeros_like(verdicts.rewards))
    assert pool.select(rollouts, nothing) == ()
    ((joined, result),) = pool.select(rollouts, nothing)
    assert len(joined.prompts) == 0 and result.rewards.shape == (0, G)


def test_the_pool_survives_a_reload_without_objects_in_the_checkpoint(tmp_path):
    first, second = (InformativePool(questions=4, max_batches=9) for _ in range(2))
    rollouts, verdicts = judged()
    first.select(rollouts, verdicts)
    torch.save(first.state_dict(), tmp_path / "pool.pt")
    second.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    ((mine, _),), ((theirs, _),) = (pool.select(rollouts, verdicts) for pool in (first, second))
    assert torch.equal(mine.ids, theirs.ids) and mine.texts == theirs.texts
    assert [p.ids for p in mine.prompts] == [p.ids for p in theirs.prompts]


def test_everything_is_learned_from_at_once():
    assert Everything().select(*judged())[0][0].ids.shape[0] == 4


MEMORIES = {
    "pool": lambda: {
        "advantage": GroupRelative(),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
        "selection": InformativePool(questions=7, max_batches=3),
    },
    "drift": lambda: {
        "advantage": Routed(
            routes=(
                Route(advantage=JSD, where=Failed()),
                Route(
                    advantage=GroupRelative(modulator=Surprise()),
                    where=RateWithin(low=0.3, high=0.7, rates=DecayedBeta()),
                ),
            )
        ),
        "teacher": Restart(every=2, context=RememberedDemonstration()),
        "weighting": Uniform(),
    },
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_run_with_memory_resumes_bit_for_bit(qwen3, tmp_path, name):
    class SaveHalfWay(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(model, *callbacks, **kwargs):
        torch.manual_seed(0)
        run = trainer(tmp_path, limit_val_batches=0, callbacks=list(callbacks))
        run.fit(model, data(Toys(28)), **kwargs)
        return run

    def tensors(model):
        return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}

    whole, resumed = (module(qwen3, **MEMORIES[name]()) for _ in range(2))
    assert fit(whole, SaveHalfWay()).global_step > 1
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert any(v for k, v in saved.items() if k.endswith("_extra_state"))
    fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.batches == whole.batches == 7
    for key, value in tensors(whole).items():
        torch.testing.assert_close(tensors(resumed)[key], value, rtol=0, atol=0, msg=key)


# ------------------------------------------------------------------------- frozen pass rates


def rates(folder, policy, **changes):
    content = {"format": FORMAT, "policy": "table", "fingerprint": fingerprint(policy)}
    content |= {"rates": {"q0": [1, 4], "q1": [2, 4], "q2": [4, 4]}} | changes
    (folder / "rates.json").write_text(json.dumps(content))
    return str(folder / "rates.json")


def test_frozen_pass_rates_weigh_by_the_files_mean_and_not_by_the_batch(tmp_path):
    weighting = FrozenPassRate(path=rates(tmp_path, TablePolicy()))
    # p (1 - p): 3/16, 4/16, 0, of mean 7/48; the batch's own pass rates do not matter
    weights = weighting.weigh(rewarded(0, 4, keys=("q1", "q2")))[:, 0]
    assert weights.tolist() == pytest.approx([(4 / 16) / (7 / 48), 0])


def test_frozen_pass_rates_refuse_another_policy_and_other_data(tmp_path):
    weighting = FrozenPassRate(path=rates(tmp_path, TablePolicy()))
    weighting.configure(TablePolicy())
    with pytest.raises(ConfigurationError, match="were measured with another policy"):
        weighting.configure(TablePolicy(seed=1))
    with pytest.raises(ConfigurationError, match="has no rate of question 'q9'"):
        weighting.weigh(rewarded(1, keys=("q9",)))
    with pytest.raises(ValueError, match="is not a file of pass rates"):
        FrozenPassRate(path=rates(tmp_path, TablePolicy(), format="other"))
    with pytest.raises(ValueError, match="every weight is 0"):
        FrozenPassRate(path=rates(tmp_path, TablePolicy(), rates={"q0": [4, 4]}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardFilter(low=0.9, high=0.1), r"`HardFilter\(low=..., high=...\)` must have"),
        (lambda: Product(factors=()), "at least one weighting"),
        (lambda: FrozenPassRate(path="no.json"), "cannot be read; write it with `scsdpo rates"),
        (lambda: FrozenPassRate(path="no.json", solved=-1), r"`FrozenPassRate\(solved=...\)`"),
        (lambda: Position(floor=2), r"`Position\(floor=...\)` must be in \[0, 1\], got 2"),
        (lambda: Position(width=0), r"`Position\(width=...\)` must be > 0, got 0"),
        (lambda: MovingAverage(follow=0), r"`MovingAverage\(follow=...\)`"),
        (lambda: DecayedBeta(prior=-1), r"`DecayedBeta\(prior=...\)` must be >= 0, got -1"),
        (lambda: DecayedBeta(decay=0), r"`DecayedBeta\(decay=...\)`"),
        (lambda: Ramp(start=0, end=1, steps=0), r"`Ramp\(steps=...\)` must be >= 1, got 0"),
        (lambda: Warmup(steps=-1), r"`Warmup\(steps=...\)` must be >= 0, got -1"),
        (lambda: LogitMix(share=Constant(2.0)), r"`LogitMix\(share=...\)` must stay in \[0, 1\]"),
        (lambda: LogitMix(share=Ramp(0.5, 1.5, 9)), "got 0.5 to 1.5"),
        (lambda: DivergenceMix(most=2), r"`DivergenceMix\(most=...\)`"),
        (lambda: DivergenceMix(sharpness=-1), r"`DivergenceMix\(sharpness=...\)`"),
        (lambda: TeacherRatio(mix=2), r"`TeacherRatio\(mix=...\)`"),
        (lambda: TeacherRatio(band=-1), r"`TeacherRatio\(band=...\)`"),
        (lambda: Surprise(sharpness=-1), r"`Surprise\(sharpness=...\)`"),
        (lambda: Surprise(cap=0), r"`Surprise\(cap=...\)` must be >= 1, got 0"),
        (lambda: Routed(routes=()), "at least one route"),
        (lambda: Routed(routes=(Route(advantage=JSD, weight=math.inf),)), r"`Route\(weight=...\)`"),
        (lambda: AllOf(routers=()), "at least one router"),
        (lambda: RateWithin(low=0.5, high=0.1), r"`RateWithin\(low=..., high=...\)` must have"),
        (lambda: SelfDistillation(summand_clip=0), r"`SelfDistillation\(summand_clip=...\)`"),
        (
            lambda: SelfDistillation(alpha=1, support=Sampled(), summand_clip=1.0),
            "has no summands to clip",
        ),
        (lambda: Restart(every=0), r"`Restart\(every=...\)` must be >= 1, got 0"),
        (lambda: Restart(rate=2), r"`Restart\(rate=...\)` must be in \[0, 1\], got 2"),
        (lambda: RememberedDemonstration(size=0), r"`RememberedDemonstration\(size=...\)`"),
        (lambda: InformativePool(questions=0), r"`InformativePool\(questions=...\)`"),
        (lambda: InformativePool(questions=1, max_batches=0), r"\(max_batches=...\)`"),
    ],
)
def test_bad_arguments_name_class_argument_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        (
            {**PG, "advantage": GroupRelative(modulator=TeacherRatio())},
            "GroupRelative needs a teacher, but model.teacher is NoTeacher",
        ),
        (
            {**PG, "selection": InformativePool(questions=2), "sampling": Sampling(n=1)},
            "model.selection: InformativePool compares the rollouts|model.advantage: GroupRelative",
        ),
        ({"advantage": ReferenceKL(), "teacher": NoTeacher()}, "ReferenceKL needs a reference"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(strategies, message):
    from scsdpo.module import PolicyOptimizer

    with pytest.raises(ConfigurationError, match=message):
        PolicyOptimizer(TablePolicy(), **strategies)
