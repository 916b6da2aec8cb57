"""Memory that runs out costs a step's time, and no number of it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import scsdpo
from batches import exact_norm
from runs import data, module, trainer
from scsdpo.checkpoints import Checkpoint
from scsdpo.errors import TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.rollout import HFRollout
from scsdpo.training import Limits
from scsdpo.training.budget import CALM, Budget, OutOfMemory
from scsdpo.training.on_failure import newest_checkpoint

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


class Scarce:
    """Stands before a policy's forward and raises at the calls whose numbers it was given."""

    def __init__(self, policy, error, at):
        self.forward, self.error, self.at, self.calls = policy.forward, error, at, 0
        policy.forward = self

    def __call__(self, *args):
        self.calls += 1
        if self.calls in self.at:
            raise self.error
        return self.forward(*args)


def fitted(folder, root, *, error=CPU, at=(), **settings):
    """A run in float64, and its policy's and teacher's weights."""
    policy = CausalLM(str(folder), self_check=False)  # whose forwards are not counted
    policy.configure_model()
    model = module(folder, policy.double(), **settings)
    scarce = Scarce(policy, error, at)
    run = trainer(root)
    run.fit(model, data())
    return {n: t.clone() for n, t in model.state_dict().items()}, run, scarce


def assert_equal(got, expected, *, atol):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
def test_a_step_that_ran_out_of_memory_is_done_again_with_half_the_budget(
    qwen3, tmp_path, monkeypatch, error
):
    """The micro-batches differ from then on, and with them the rounding; in float64, 1e-12."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    # Plain descent: AdamW divides gradients of 1e-17 by themselves.
    steps = {"optimizer": partial(torch.optim.SGD, lr=0.1), "limits": Limits(max_tokens=60)}
    expected, clean, whole = fitted(qwen3, tmp_path / "clean", **steps)
    with pytest.warns(
        UserWarning, match=r"out of memory .* trying again with 30 tokens of a micro"
    ):
        got, run, scarce = fitted(qwen3, tmp_path / "hurt", error=error, at=(2,), **steps)
    assert scarce.calls > whole.calls  # smaller micro-batches
    assert run.global_step == clean.global_step == 3
    assert_equal(got, expected, atol=1e-12)


def test_the_same_micro_batches_give_the_same_bits(qwen3, tmp_path):
    limits = Limits(max_tokens=1)  # a rollout a micro-batch: there is no less
    expected, _, whole = fitted(qwen3, tmp_path / "clean", limits=limits)
    with pytest.warns(UserWarning, match="out of memory"):
        got, _, scarce = fitted(qwen3, tmp_path / "hurt", at=(3,), limits=limits)
    assert scarce.calls == whole.calls + 3  # two were done twice
    assert_equal(got, expected, atol=0)


def test_twice_at_the_least_the_run_stops_with_the_remedy_and_keeps_the_state(qwen3, tmp_path):
    model = module(qwen3, limits=Limits(max_tokens=1))
    model.configure_model()
    saved = Checkpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[saved])
    second = Scarce(model.policy, CPU, at=range(30, 99))  # a batch has at most 16 rollouts
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(
            TrainingStopped, match=r"even with the fewest tokens .* model\.limits\.max_tokens"
        ),
    ):
        run.fit(model, data())
    assert second.calls == 31
    state = torch.load(newest_checkpoint(run), weights_only=True)
    assert state["global_step"] == run.global_step >= 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state["state_dict"][name], parameter.data, rtol=0, atol=0)


def test_memory_that_runs_out_in_the_optimizer_stops_the_run_and_saves_no_half(qwen3, tmp_path):
    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["taken"] == 1:
                next(iter(self.param_groups[0]["params"])).data.add_(1)
                raise CUDA
            self.param_groups[0]["taken"] += 1
            return super().step(closure)

    def optimizer(parameters):
        made = Greedy(parameters, lr=0.1)
        made.param_groups[0]["taken"] = 0
        return made

    saved = Checkpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_minutes=0)
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[saved])
    with pytest.raises(TrainingStopped, match=r"out of memory in the optimizer .* Lora"):
        run.fit(module(qwen3, optimizer=optimizer), data())
    assert torch.load(newest_checkpoint(run), weights_only=True)["global_step"] == 1


def test_another_error_of_the_same_type_is_not_taken_for_memory(qwen3, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        fitted(qwen3, tmp_path, error=RuntimeError("shapes cannot be multiplied"), at=(2,))


def test_memory_that_does_not_suffice_for_the_self_check_is_said_in_one_line(qwen3, tmp_path):
    policy = CausalLM(str(qwen3))
    policy.configure_model()
    Scarce(policy, CPU, at=(1,))
    with pytest.raises(TrainingStopped, match=r"out of memory in the self-check.* Lora"):
        trainer(tmp_path).fit(module(qwen3, policy), data())


def test_sampling_is_done_again_with_fewer_rows_in_flight(qwen3, tmp_path, monkeypatch):
    sample, rows = HFRollout.sample, []

    def scarce(self, policy, prompts, sampling):
        rows.append(self.max_rows)
        if self.max_rows > 4:
            raise CUDA
        return sample(self, policy, prompts, sampling)

    expected, *_ = fitted(qwen3, tmp_path / "clean")
    monkeypatch.setattr(HFRollout, "sample", scarce)
    with pytest.warns(UserWarning, match="responses in flight instead of"):
        got, *_ = fitted(qwen3, tmp_path / "hurt")
    assert rows[:4] == [16, 8, 4, 4]  # and remembered
    assert_equal(got, expected, atol=1e-6)


def test_a_budget_comes_back_slowly():
    tried = []

    def work(budget):
        tried.append(budget)
        if len(tried) == 1:
            raise OutOfMemory("full")
        return budget

    budget = Budget("things", "buy memory")
    run = partial(budget.run, work, most=64, extent=lambda: (1, 64))
    with pytest.warns(UserWarning, match="out of memory"):
        assert run() == 32
    assert [run() for _ in range(CALM)] == [32] * (CALM - 1) + [64]
    assert run() == 64


def test_ranks_agree_when_one_of_them_runs_out(qwen3, tmp_path):
    """Rank 1 alone fails, in the measuring pass and in a micro-batch: both begin again."""
    script = Path(__file__).parent / "hurt_ranks.py"
    results = {}
    for fault in ("none", "memory"):
        out = tmp_path / fault
        command = [sys.executable, str(script), str(qwen3), fault, str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=420, env=env())
        assert done.returncode == 0, done.stderr[-3000:]
        results[fault] = torch.load(out / "weights.pt"), done.stderr
    assert "out of memory" in results["memory"][1]
    assert_equal(results["memory"][0], results["none"][0], atol=1e-6)


def env():
    paths = [str(Path(__file__).parents[1] / "helpers"), str(Path(scsdpo.__file__).parents[1])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
