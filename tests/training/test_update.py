"""The update: numbers do not depend on micro-batches, order, skipping or prefix sharing."""

from dataclasses import replace

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from batches import ALL, METHODS, G, Q, double_policy, exact_norm, gradient, parts
from scsdpo.advantage import Blend, Full, ReferenceAnchor, SelfDistillation, Weighted
from scsdpo.loss import Head, unobserved
from scsdpo.policy import CausalLM, Lora
from scsdpo.reduction import TokenMean
from scsdpo.teacher import EMA, Frozen, PlainPrompt, SiblingDemonstration, TrustRegion
from scsdpo.training.trace import trace_update
from scsdpo.weighting import Horizon, PassRate, TeacherEntropy, UniformTokens


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)


def assert_same(first, second, tolerance):
    assert first[1].keys() == second[1].keys() and first[1]
    assert first[0] == pytest.approx(second[0], rel=1e-9, abs=tolerance)
    scale = max(g.abs().max() for g in first[1].values())
    for name, grad in first[1].items():
        assert (grad - second[1][name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 40, 80])
def test_any_micro_batch_split_gives_the_gradient_of_none(qwen3, exact, method, budget):
    policy = double_policy(qwen3)
    advantage, settings = METHODS[method]()
    batch, update = parts(policy, advantage, **settings)
    whole = gradient(policy, batch, update)
    split = gradient(policy, batch, update, budget=budget)
    assert whole[2] == 1 < split[2]
    assert_same(whole, split, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_prefix_gives_the_gradient_of_separate_rows(qwen3, exact, method, monkeypatch):
    policy = double_policy(qwen3)
    advantage, settings = METHODS[method]()
    batch, update = parts(policy, advantage, **settings)
    shared = gradient(policy, batch, update)
    monkeypatch.setattr(CausalLM, "share_prefixes", False)
    assert_same(shared, gradient(policy, batch, update), 1e-12)


def test_lora_gradients_do_not_depend_on_the_split_either(qwen3, exact):
    policy = double_policy(qwen3, adapter=Lora(r=2))
    advantage, settings = METHODS["sc-sdpo"]()
    batch, update = parts(policy, advantage, **settings)
    whole = gradient(policy, batch, update)
    assert_same(whole, gradient(policy, batch, update, budget=100), 1e-12)
    assert all("lora_" in name for name in whole[1])


def test_with_the_models_own_float32_norm_splits_agree_to_1e_6(qwen3):
    policy = double_policy(qwen3)
    advantage, settings = METHODS["sc-sdpo"]()
    batch, update = parts(policy, advantage, **settings)
    whole = gradient(policy, batch, update)
    assert_same(whole, gradient(policy, batch, update, budget=100), 1e-6)


def test_skipping_rollouts_without_credit_changes_nothing(qwen3, exact):
    """Weight 0 drops a rollout; running it with weight 1e-300 is doing the work."""
    policy = double_policy(qwen3)
    advantage, settings = METHODS["sc-sdpo"]()
    batch, update = parts(policy, advantage, **settings)
    assert 0 < batch.active.sum() < batch.plan.active.sum()
    working = replace(batch, weights=batch.weights.clamp(min=1e-300))
    assert working.active.sum() > batch.active.sum()
    assert_same(gradient(policy, batch, update), gradient(policy, working, update), 1e-12)


def test_updates_by_question_use_their_own_denominators(policy):
    advantage, settings = METHODS["grpo"]()
    batch, update = parts(policy, advantage, reduction=TokenMean(over="all"), **settings)
    first = gradient(policy, batch, update, rows=[0, 1, 2])
    lengths = batch.sampled.sum(-1)
    whole = gradient(policy, batch, update)
    fraction = lengths[:3].sum() / lengths.sum()
    other = gradient(policy, batch, update, rows=list(range(3, Q * G)))
    for name, grad in whole[1].items():
        mix = fraction * first[1][name] + (1 - fraction) * other[1][name]
        torch.testing.assert_close(grad, mix, rtol=1e-3, atol=1e-5)


def test_a_measuring_pass_gives_the_log_probs_of_the_loss(policy):
    advantage, settings = METHODS["grpo"]()
    batch, update = parts(policy, advantage, **settings)
    measured = update.measure(policy, batch, ALL, 10**6)
    ((output, _),) = list(update.losses(policy, batch, ALL, 10**6))
    ours = measured[batch.active][batch.sampled[batch.active]]
    torch.testing.assert_close(ours.float(), output.logprob, rtol=1e-5, atol=1e-5)
    assert measured[~batch.sampled].isnan().all()


def test_the_ratio_is_one_in_the_first_update_and_live_after(policy):
    advantage, settings = METHODS["grpo"]()
    batch, update = parts(policy, advantage, **settings)
    old = replace(batch, old_logprobs=update.measure(policy, batch, ALL, 10**6))
    assert_same(gradient(policy, batch, update), gradient(policy, old, update), 1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    ((output, _),) = list(update.losses(policy, old, ALL, 10**6))
    ((fresh, _),) = list(update.losses(policy, batch, ALL, 10**6))
    assert not torch.allclose(output.objective, fresh.objective)


def test_teacher_entropy_of_the_loss_is_that_of_the_teacher(qwen3, exact):
    """Weights by the measured entropy equal weights computed from the teacher's own logits."""
    policy = double_policy(qwen3)
    batch, update = parts(
        policy, SelfDistillation(), teacher=EMA(), token_weighting=TeacherEntropy()
    )
    ((output, _),) = list(update.losses(policy, batch, ALL, 10**6))
    plain = replace(update, token_weighting=UniformTokens(), needs=frozenset())
    ((uniform, _),) = list(plain.losses(policy, batch, ALL, 10**6))
    torch.testing.assert_close(output.objective, uniform.objective)
    assert output.loss != uniform.loss


def test_the_teacher_gets_no_gradient_and_keeps_its_weights(policy):
    teacher = EMA(context=SiblingDemonstration())
    batch, update = parts(policy, SelfDistillation(), teacher=teacher)
    before = [p.clone() for p in teacher.parameters()]
    gradient(policy, batch, update)
    assert all(p.grad is None for p in teacher.parameters())
    for now, then in zip(teacher.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_nothing_active_runs_nothing(policy):
    advantage, settings = METHODS["sc-sdpo"]()
    batch, update = parts(policy, advantage, **settings)
    nothing = replace(batch, weights=torch.zeros_like(batch.weights))
    assert list(update.losses(policy, nothing, ALL, 10**6)) == []


def test_the_head_is_cast_once_a_step_for_each_set_of_weights(qwen3, monkeypatch):
    """Also where a teacher is measured first: hidden states are kept, and no head with each."""
    policy = CausalLM(str(qwen3))
    policy.configure_model()
    advantage, settings = METHODS["hybrid+anchor+entropy"]()
    batch, update = parts(policy, advantage, **settings)
    cast = []
    of = Head.of
    monkeypatch.setattr(Head, "of", staticmethod(lambda linear: cast.append(linear) or of(linear)))
    with torch.autocast("cpu", torch.bfloat16):
        assert gradient(policy, batch, update, budget=40)[2] > 2
    assert len(cast) == len(set(cast)) == 3  # student, teacher, reference


def test_nothing_of_a_step_is_left_when_its_losses_had_no_backward(policy):
    advantage, settings = METHODS["sc-sdpo"]()
    batch, update = parts(policy, advantage, **settings)
    with torch.no_grad():
        assert list(update.losses(policy, batch, ALL, 60))
    list(update.losses(policy, batch, ALL, 60))
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("budget", [10**6, 40])
def test_the_objective_that_is_measured_before_the_loss_is_the_one_that_the_loss_has(
    qwen3, exact, budget
):
    class Looks(Horizon):
        def weigh(self, signals, distilled):
            seen.append(signals.objective)
            return super().weigh(signals, distilled)

    seen = []
    taught = Weighted(advantage=SelfDistillation(support=Full()), weighting=PassRate())
    anchored = Weighted(advantage=ReferenceAnchor(), weight=0.1)
    policy = double_policy(qwen3)
    batch, update = parts(
        policy,
        Blend(parts=(taught, anchored)),
        teacher=TrustRegion(mix=0.3),
        reference=Frozen(context=PlainPrompt()),
        token_weighting=Looks(),
    )
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    trace = trace_update(update, policy, batch, max_tokens=budget, observe=unobserved)
    expected = trace.objective.flatten(0, 1).nan_to_num()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(seen[0], expected, rtol=1e-10, atol=1e-13)
