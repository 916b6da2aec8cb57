"""Whole training runs: what each kind of batch does, what is logged, saved and restored."""

import copy
import math

import lightning as L
import pytest
import torch

from coins import Unready
from runs import Always, Toys, data, module, trainer, weights
from scsdpo.advantage import (
    Advantage,
    Blend,
    Full,
    GroupRelative,
    LogitMix,
    Plan,
    ReferenceAnchor,
    SelfDistillation,
    Weighted,
)
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.loss import Importance, SparseCredit, TokenImportance
from scsdpo.policy import CausalLM, FullFineTune, Lora
from scsdpo.state import Ramp
from scsdpo.teacher import EMA, Feedback, Frozen, Live, NoTeacher, PlainPrompt, TrustRegion
from scsdpo.training import Limits
from scsdpo.training.finite import all_zero, total_norm
from scsdpo.types import Sampling
from scsdpo.weighting import (
    HardFilter,
    Overlong,
    PassRate,
    Position,
    TeacherEntropy,
    TokenWeighting,
    Uniform,
    Weighting,
)

METHODS = {
    "sc-sdpo": {},
    "sdpo": {"weighting": Uniform(), "importance": TokenImportance()},
    "grpo": {"advantage": GroupRelative(), "teacher": NoTeacher(), "weighting": Uniform()},
    "live": {"teacher": Live()},
    "frozen": {"teacher": Frozen()},
    "trust-region": {"teacher": TrustRegion(mix=0.5)},
    "entropy": {"token_weighting": TeacherEntropy()},
    "anchor": {
        "advantage": Blend(
            parts=(
                Weighted(advantage=SelfDistillation(support=Full())),
                Weighted(advantage=ReferenceAnchor(), weight=0.1),
            )
        ),
        "reference": Frozen(context=PlainPrompt()),
    },
    "two-updates": {"updates_per_rollout": 2, "importance": TokenImportance()},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs(qwen3, tmp_path, method, lora):
    policy = CausalLM(str(qwen3), adapter=Lora(r=2) if lora else FullFineTune())
    model = module(qwen3, policy, **METHODS[method])
    run = trainer(tmp_path, max_epochs=2)
    model.configure_model()
    before = weights(model.policy)
    run.fit(model, data())
    moved = [n for n, p in model.policy.named_parameters() if not torch.equal(p, before[n])]
    assert run.global_step >= 4 and moved
    assert not lora or all("lora_" in name for name in moved)
    logged = run.callback_metrics
    assert {"train/pass_rate", "train/informative", "train/response_length", "train/truncated"} <= {
        *logged
    }
    assert {"train/entropy", "train/gradient_norm", "train/effective_questions"} <= {*logged}
    assert ("train/divergence" in logged) == (
        method not in ("grpo", "anchor")
    )  # a blend has no one divergence
    if method != "two-updates":  # there the second update's policy is not the sampler's
        assert logged["train/logprob_gap_max"] < 1e-4
    assert {"val/mean@2", "val/maj@2", "val/even/mean@2", "val/odd/mean@2"} <= {*logged}


@pytest.mark.parametrize("reward", [0.0, 1.0], ids=["no success", "all successes"])
def test_a_batch_without_information_takes_no_step(qwen3, tmp_path, reward):
    """Not even AdamW's, which moves weights on zero gradients; nor does the teacher move."""
    model = module(qwen3)
    model.configure_model()
    before = weights(model)
    run = trainer(tmp_path)
    run.fit(model, data(Toys(verifier=Always(reward))))
    assert run.global_step == 0
    assert model.steps.skipped == 3 and model.batches == 3
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_verifier_that_fails_on_every_response_ends_the_run_in_its_first_batches(qwen3, tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(TrainingStopped, match=r"Unready fails too often: .*no licence"):
        run.fit(module(qwen3), data(Toys(verifier=Unready())))
    assert run.global_step == 0


class Silent(TokenWeighting):
    """Every token of a batch weighs 0, but for those of the first `loud` batches."""

    def __init__(self, loud=0):
        self.left = loud

    def weigh(self, signals, distilled):
        self.left -= 1
        return torch.full(distilled.shape, float(self.left >= 0))


class NoCredit(Advantage):
    """Rollouts whose credit turns out to be 0 in the forward."""

    def plan(self, judged, available):
        everyone = torch.ones_like(available)
        return Plan(
            active=everyone,
            needs_teacher=~everyone,
            needs_reference=~everyone,
            credit=SparseCredit.nothing,
        )


class NoTrust(Importance):
    """Weights of 0, which no table knows before the loss."""

    def weigh(self, chunk):
        return torch.zeros_like(chunk.logprob)


class EvenQuestions(Weighting):
    """Half of the questions, which a token weighting of the other half leaves nothing of."""

    def weigh(self, judged):
        weights = torch.ones_like(judged.rewards)
        weights[1::2] = 0
        return weights


class OddTokens(TokenWeighting):
    def weigh(self, signals, distilled):
        weights = torch.ones(distilled.shape)
        weights.view(-1, 2, 4, weights.shape[-1])[:, 0] = 0  # of even questions, G = 4
        return weights


CUT = Sampling(n=4, max_new_tokens=1, seed=3)
"""Of its responses none ends by itself."""
NOTHING = {
    "question": {"weighting": HardFilter(low=1.0, high=1.0)},
    "overlong": {
        "weighting": Uniform(),
        "token_weighting": Overlong(),
        "sampling": CUT,
    },
    "position": {
        "weighting": Uniform(),
        "token_weighting": Position(floor=0, centre=9, width=0.01),
    },
    "product": {"weighting": EvenQuestions(), "token_weighting": OddTokens()},
    "credit": {"weighting": Uniform(), "advantage": NoCredit(), "teacher": NoTeacher()},
    "importance": {"weighting": Uniform(), "importance": NoTrust()},
    "blend": {
        "weighting": Uniform(),
        "advantage": Blend(parts=(Weighted(advantage=SelfDistillation(), weight=0.0),)),
    },
}
"""Sources of a batch from which nothing can be learned."""


def state(model, run):
    """All that a step moves: weights, teachers, optimizer, schedule, and what counts steps."""
    optimizer, schedule = model.optimizers(), model.lr_schedulers()
    moments = [v for each in optimizer.state.values() for v in each.values()]
    counted = {k: v for k, v in model.state_dict().items() if not k.startswith("steps.")}
    counted.pop("batches", None)
    return {**counted, "moments": moments, "epoch": schedule.last_epoch, "step": run.global_step}


@pytest.mark.parametrize("source", NOTHING)
def test_where_nothing_can_be_learned_no_step_is_taken_and_it_is_counted(qwen3, tmp_path, source):
    settings = NOTHING[source]
    model = module(qwen3, **settings)
    model.configure_model()
    before, run = weights(model), trainer(tmp_path)
    run.fit(model, data())
    assert run.global_step == 0 and model.steps.skipped == 3
    assert model.lr_schedulers().last_epoch == 0 and not model.optimizers().state
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_silent_batch_after_a_step_moves_neither_momentum_nor_teacher_nor_ramp(qwen3, tmp_path):
    """AdamW has momentum by then, and would move weights on a gradient of 0."""
    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(copy.deepcopy(state(pl_module, trainer)))

    mix = SelfDistillation(target=LogitMix(share=Ramp(0.5, 1.0, 9)))
    settings = {"advantage": mix, "weighting": Uniform(), "token_weighting": Silent(loud=1)}
    model, run = module(qwen3, **settings), trainer(tmp_path, callbacks=[See()])
    run.fit(model, data())
    first, *others = seen
    assert run.global_step == 1 and model.steps.skipped == 2 and first["moments"]
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert_same(other[name], value)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_run_whose_tokens_all_weigh_nothing_stops_and_says_so(qwen3, tmp_path):
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    settings = {
        "weighting": Uniform(),
        "token_weighting": Overlong(),
        "sampling": CUT,
    }
    model = module(qwen3, limits=Limits(max_idle_batches=2), **settings)
    with pytest.raises(TrainingStopped, match=r"2 batches .* weight 0, as Overlong does"):
        run.fit(model, data())


def test_a_rank_whose_tokens_all_weigh_0_runs_them_if_another_ranks_do_not(qwen3, monkeypatch):
    from batches import ALL, double_policy, parts
    from scsdpo.training import step

    policy = double_policy(qwen3)
    batch, update = parts(
        policy, GroupRelative(), token_weighting=Position(floor=0, centre=9, width=0.01)
    )
    assert list(update.losses(policy, batch, ALL, 10**6)) == []
    monkeypatch.setattr(step, "all_max", torch.ones_like)
    ((output, _),) = update.losses(policy, batch, ALL, 10**6)
    assert output.loss == 0 and len(output.logprob) == batch.sampled[batch.active].sum()


def test_a_gradient_that_is_small_and_not_0_is_one():
    tiny = torch.full((3,), 1e-30)
    assert total_norm([tiny]) == 0 and not all_zero([tiny]) and all_zero([tiny * 0])


def test_a_run_that_never_learns_stops_with_the_reason(qwen3, tmp_path):
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    with pytest.raises(TrainingStopped, match=r"2 batches in a row .* pass rate 0.00, "):
        run.fit(module(qwen3, limits=Limits(max_idle_batches=2)), data(Toys(verifier=Always(0.0))))


def test_feedback_teaches_a_batch_without_success_unless_the_weighting_drops_it(qwen3, tmp_path):
    from dataclasses import dataclass

    from scsdpo.types import Verdict
    from scsdpo.verifiers import Verifier

    @dataclass(frozen=True)
    class Wrong(Verifier):
        def verify(self, prompt, response):
            return Verdict(reward=0.0, feedback="no")

    for weighting, steps in ((Uniform(), 3), (PassRate(), 0)):
        run = trainer(tmp_path)
        teacher = EMA(context=Feedback())
        run.fit(module(qwen3, weighting=weighting, teacher=teacher), data(Toys(verifier=Wrong())))
        assert run.global_step == steps


def test_a_run_that_ends_responses_at_once_goes_on(qwen3, tmp_path):
    """Responses of one token, the end of the sequence: empty texts, no error."""
    run = trainer(tmp_path)
    model = module(qwen3, sampling=Sampling(n=4, max_new_tokens=1))
    run.fit(model, data())
    assert run.callback_metrics["train/response_length"] == 1


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def poisoned(model, steps):
    """The module with a nan gradient in the first `steps` optimizer steps."""
    original, count = model.policy.runner, [0]

    def runner(rows, chosen, max_tokens, weights=None, watches=False):
        made = original(rows, chosen, max_tokens, weights, watches=watches)
        if weights is None and len(rows.prompts) > 1:  # not the probe's
            count[0] += 1
            if count[0] <= steps:
                run = made.run
                made.run = lambda micro, loss: run(
                    micro, lambda hidden, head: loss(Poison.apply(hidden), head)
                )
        return made

    model.policy.runner = runner
    return model


def test_a_non_finite_gradient_is_skipped_counted_and_reported(qwen3, tmp_path):
    model = poisoned(module(qwen3, advantage=GroupRelative(), teacher=NoTeacher()), steps=1)
    run = trainer(tmp_path)
    with pytest.warns(
        UserWarning, match="step skipped, because its loss or gradient is not finite"
    ):
        run.fit(model, data())
    assert run.global_step == 2 and model.steps.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_too_many_non_finite_steps_stop_the_run_with_the_reason(qwen3, tmp_path):
    model = module(
        qwen3, advantage=GroupRelative(), teacher=NoTeacher(), limits=Limits(max_bad_steps=2)
    )
    model.configure_model()
    before = weights(model)
    with (
        pytest.warns(UserWarning, match="step skipped"),
        pytest.raises(TrainingStopped, match="2 steps in a row were not finite"),
    ):
        trainer(tmp_path).fit(poisoned(model, steps=99), data())
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sc-sdpo", "anchor"])
def test_a_resumed_run_equals_an_uninterrupted_one(qwen3, tmp_path, method, lora):
    """Weights, teacher, optimizer, data position and draws: bit for bit."""

    def fresh():
        torch.manual_seed(0)  # peft draws its factors
        policy = CausalLM(str(qwen3), adapter=Lora(r=2) if lora else FullFineTune())
        return module(qwen3, policy, **METHODS[method])

    def fit(model, batches, **kwargs):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=batches, max_epochs=-1, limit_val_batches=0)
        run.fit(model, data(), **kwargs)
        return run

    whole = fresh()
    fit(whole, 5)
    half = fresh()
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh()
    fit(resumed, 5, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.batches == whole.batches
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


def test_lora_checkpoints_hold_no_base_and_frozen_teachers_are_not_saved(qwen3, tmp_path):
    model = module(qwen3, CausalLM(str(qwen3), adapter=Lora(r=2)), teacher=EMA())
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]
    tensors = [key for key in saved if key.startswith(("policy.", "teacher."))]
    assert any(".teacher." in key for key in tensors)  # the EMA's adapter
    assert all("lora_" in key for key in tensors)


def test_a_checkpoint_of_another_configuration_is_refused(qwen3, tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(qwen3), data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    other = module(qwen3, teacher=Frozen())
    with pytest.raises(ConfigurationError, match="does not fit this configuration"):
        trainer(tmp_path).fit(other, data(), ckpt_path=tmp_path / "x.ckpt")


def test_validation_draws_the_same_responses_each_time(qwen3, tmp_path):
    model = module(qwen3)
    results = [trainer(tmp_path).validate(model, data(), verbose=False)[0] for _ in range(2)]
    assert results[0] == results[1]


def test_predict_gives_a_record_per_response(qwen3, tmp_path):
    (batch,) = trainer(tmp_path).predict(module(qwen3), data())
    assert len(batch) == 4 * 2
    of_verdict = {"reward", "answer", "feedback", "error", "earned", "stopped"}
    of_prompt = {"key", "category", "question", "gold"}
    of_response = {"sample", "response", "n_tokens", "finished"}
    assert of_verdict | of_prompt | of_response == set(batch[0])
    assert [record["sample"] for record in batch[:3]] == [0, 1, 0]
    assert batch[2]["question"] == "1?" and batch[2]["category"] == "odd"


def test_an_optimizer_whose_states_no_checkpoint_gives_back_is_refused(qwen3, tmp_path):
    eight_bit = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "torchao.optim.adam"})
    model = module(qwen3, optimizer=eight_bit)
    with pytest.raises(
        ConfigurationError, match=r"model\.optimizer: .*AdamW8bit.* use torch\.optim"
    ):
        trainer(tmp_path).fit(model, data())


def test_bf16_trainable_weights_are_refused(qwen3, tmp_path):
    model = module(qwen3, CausalLM(str(qwen3), dtype="bfloat16"))
    with pytest.raises(ConfigurationError, match="trainable parameters must be float32"):
        trainer(tmp_path).fit(model, data())


def test_bf16_mixed_precision_trains_with_float32_masters(qwen3, tmp_path):
    model = module(qwen3)
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(model, data())
    assert run.global_step > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run.callback_metrics["train/logprob_gap"] < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": NoTeacher()}, "SelfDistillation needs a teacher, but model.teacher is NoTeac"),
        ({"advantage": GroupRelative()}, "model.teacher: EMA is never used"),
        ({"sampling": Sampling(n=1)}, "model.weighting: PassRate compares the rollouts"),
        ({"reference": Frozen(context=PlainPrompt())}, "model.reference: Frozen is never used"),
        (
            {"advantage": ReferenceAnchor(), "teacher": NoTeacher()},
            "ReferenceAnchor needs a reference",
        ),
        (
            {
                "advantage": GroupRelative(),
                "teacher": NoTeacher(),
                "token_weighting": TeacherEntropy(),
            },
            "TeacherEntropy reads the teacher",
        ),
        ({"updates_per_rollout": 0}, "model.updates_per_rollout must be >= 1"),
        (
            {
                "advantage": Blend(parts=(Weighted(advantage=GroupRelative()),)),
                "teacher": NoTeacher(),
                "importance": TokenImportance(),
                "updates_per_rollout": 2,
            },
            "model.importance: .* both TokenImportance .* set model.importance to Sampler",
        ),
    ],
)
def test_strategies_that_do_not_fit_together_are_refused_before_any_weight_loads(
    qwen3, settings, message
):
    policy = CausalLM(str(qwen3))
    with pytest.raises(ConfigurationError, match=message):
        module(qwen3, policy, **settings)
    assert policy.model is None


def test_more_updates_than_questions_is_refused(qwen3, tmp_path):
    with pytest.raises(ConfigurationError, match=r"raise data\.questions_per_batch"):
        trainer(tmp_path).fit(module(qwen3, updates_per_rollout=9), data())
