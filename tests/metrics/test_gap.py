"""The check between sampler and trainer: closed forms, limits, and a run that it stops."""

from dataclasses import dataclass, replace

import pytest
import torch

from runs import data, module, trainer
from scsdpo.errors import TrainingStopped
from scsdpo.metrics import GapCheck
from scsdpo.rollout import HFRollout, Rollout
from scsdpo.types import Sampling


def test_the_gap_has_its_closed_form():
    trainer = [torch.tensor([-1.0, -2.0]), torch.tensor([[-3.0, torch.nan], [-1.0, -1.0]])]
    sampler = [torch.tensor([-1.0, -2.5]), torch.tensor([[-2.0, -1.0], [-1.25, torch.nan]])]
    # Known gaps: 0, 0.5, 1, 0.25; one of them is beyond 0.5.
    measured = GapCheck(token=0.5).measure(zip(trainer, sampler, strict=True))
    assert measured == {
        "logprob_gap": 1.75 / 4,
        "logprob_gap_max": 1.0,
        "logprob_gap_share": 0.25,
    }


@pytest.mark.parametrize(
    "pairs",
    [[], [(torch.zeros(0), torch.zeros(0))], [(torch.zeros(2), torch.full((2,), torch.nan))]],
)
def test_an_unknown_gap_is_not_reported_as_none(pairs):
    check = GapCheck(warn=0.0, stop=0.0)
    assert check.measure(pairs) == {}
    check.judge({})


def measured(mean):
    return GapCheck().measure([(torch.tensor([mean]), torch.zeros(1))])


def test_a_small_gap_passes_a_larger_one_warns_and_a_large_one_stops():
    check = GapCheck(warn=0.1, stop=0.4)
    check.judge(measured(0.1 - 1e-6))
    with pytest.warns(UserWarning, match=r"disagree by 0.2 nats .* more than model.gap.warn=0.1"):
        check.judge(measured(0.2))
    with pytest.raises(TrainingStopped, match=r"disagree by 0.5 nats .* model.gap.stop=0.4"):
        check.judge(measured(0.5))
    with pytest.raises(TrainingStopped, match="disagree by inf nats"):
        check.judge(measured(torch.inf))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": -1.0}, r"`GapCheck\(token=\.\.\.\)` must be >= 0, got -1.0"),
        ({"warn": float("nan")}, r"`GapCheck\(warn=\.\.\.\)` must be >= 0"),
        ({"warn": 0.3, "stop": 0.2}, r"`GapCheck\(stop=\.\.\.\)` must be at least warn \(0.3\)"),
    ],
)
def test_impossible_limits_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GapCheck(**settings)


@dataclass(frozen=True)
class Off(Rollout):
    """A sampler whose log-probs are off by `by` nats."""

    by: float

    def sample(self, policy, prompts, sampling):
        rollouts = HFRollout().sample(policy, prompts, sampling)
        shifted = rollouts.policy_logprobs + self.by * rollouts.sampled
        return replace(rollouts, policy_logprobs=shifted)


def test_a_sampler_that_is_far_off_stops_the_run_before_the_step(qwen3, tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(TrainingStopped, match=r"model\.gap\.stop=0\.2; no step was taken"):
        run.fit(module(qwen3, rollout=Off(0.3)), data())
    assert run.global_step == 0


def test_every_step_logs_the_gap(qwen3, tmp_path):
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"disagree by 0\.1 nats"):
        run.fit(module(qwen3, rollout=Off(0.1)), data())
    assert run.global_step > 0
    assert run.callback_metrics["train/logprob_gap"] == pytest.approx(0.1, abs=1e-4)
    assert run.callback_metrics["train/logprob_gap_max"] == pytest.approx(0.1, abs=1e-3)
    assert run.callback_metrics["train/logprob_gap_share"] == 0


def test_later_updates_on_a_batch_are_compared_before_the_policy_moved(qwen3, tmp_path):
    """A learning rate that moves it by far more than the limit."""
    run = trainer(tmp_path)
    settings = {"updates_per_rollout": 2, "gap": GapCheck(warn=1e-3, stop=1e-3)}
    run.fit(module(qwen3, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **settings), data())
    assert run.global_step > 3
    assert run.callback_metrics["train/logprob_gap_max"] < 1e-3


def test_the_rollout_is_closed_after_a_run(qwen3, tmp_path):
    closed = []

    class Counting(Rollout):
        def sample(self, policy, prompts, sampling):
            return HFRollout().sample(policy, prompts, sampling)

        def close(self):
            closed.append(True)

    trainer(tmp_path).fit(module(qwen3, rollout=Counting()), data())
    assert closed == [True]


def test_a_gap_that_is_not_known_is_not_logged(qwen3, tmp_path):
    class Unknown(Rollout):
        def sample(self, policy, prompts, sampling):
            rollouts = HFRollout().sample(policy, prompts, sampling)
            unknown = torch.where(rollouts.sampled, torch.nan, 0.0)
            return replace(rollouts, policy_logprobs=unknown)

    run = trainer(tmp_path)
    run.fit(module(qwen3, rollout=Unknown(), sampling=Sampling(n=4, max_new_tokens=8)), data())
    assert run.global_step > 0
    assert "train/logprob_gap" not in run.callback_metrics
    assert torch.isfinite(run.callback_metrics["train/loss"])
