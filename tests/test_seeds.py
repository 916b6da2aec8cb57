"""One seed decides a run; what must stay comparable between runs does not move with it."""

import math
import sys

import lightning as L
import torch

from runs import Toys, data, module, trainer, weights
from scsdpo.metrics import GapCheck
from scsdpo.policy import CausalLM, Lora
from scsdpo.seeds import resolved
from scsdpo.training.step import trained_parameters
from scsdpo.types import Sampling


def lora(folder, **settings):
    policy = CausalLM(str(folder), adapter=Lora(r=2, **settings))
    policy.configure_model()
    return weights(policy)


class Asked(L.Callback):
    """Keys of the questions asked, and the responses to the first validation question."""

    def __init__(self):
        self.train, self.first = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train += [prompt.key for prompt in batch]


def run(folder, tmp_path, monkeypatch, seed, *, data_seed="auto", sampling_seed="auto", lora=None):
    """(keys in order, weights, validation figures) of three batches under `seed`."""
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    torch.manual_seed(1234)  # torch's own state decides nothing
    asked = Asked()
    policy = CausalLM(str(folder), adapter=lora) if lora else None
    quiet = {"gap": GapCheck(warn=math.inf, stop=math.inf)} if lora else {}
    model = module(
        folder, policy, sampling=Sampling(n=4, max_new_tokens=8, seed=sampling_seed), **quiet
    )
    fit = trainer(tmp_path, max_epochs=1, callbacks=[asked], val_check_interval=1)
    before = trainer(tmp_path).validate(model, data(seed=data_seed), verbose=False)
    fit.fit(model, data(seed=data_seed))
    return asked.train, weights(model.policy), before[0]


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_two_seeds_give_two_runs_and_one_seed_one(qwen3, tmp_path, monkeypatch):
    zero, again, one = (run(qwen3, tmp_path, monkeypatch, seed) for seed in (0, 0, 1))
    assert zero[0] == again[0] and equal(zero[1], again[1])
    assert zero[0] != one[0] and not equal(zero[1], one[1])
    assert sorted(zero[0]) == sorted(one[0])  # which questions there are does not move


def test_validation_does_not_move_with_the_seed(qwen3, tmp_path, monkeypatch):
    zero, one = (run(qwen3, tmp_path, monkeypatch, seed) for seed in (0, 1))
    assert {f"val/{name}": v for name, v in zero[2].items()} == {
        f"val/{name}": v for name, v in one[2].items()
    }


def test_a_seed_of_its_own_wins(qwen3, tmp_path, monkeypatch):
    fixed = {"data_seed": 5, "sampling_seed": 6}
    zero, one = (run(qwen3, tmp_path, monkeypatch, seed, **fixed) for seed in (0, 1))
    assert zero[0] == one[0] and equal(zero[1], one[1])


def test_adapters_start_by_the_seed_whatever_was_drawn_before(qwen3, monkeypatch):
    torch.manual_seed(0)
    first = lora(qwen3)
    torch.rand(7)
    assert equal(first, lora(qwen3))
    assert equal(first, lora(qwen3, seed=0))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert not equal(first, lora(qwen3))
    assert equal(first, lora(qwen3, seed=0))


def test_dropout_follows_the_seed(qwen3, tmp_path, monkeypatch):
    fixed = {
        "data_seed": 5,
        "sampling_seed": 6,
        "lora": Lora(r=2, seed=7, lora_dropout=0.5),
    }
    zero, again, one = (run(qwen3, tmp_path, monkeypatch, seed, **fixed) for seed in (0, 0, 1))
    assert equal(zero[1], again[1]) and not equal(zero[1], one[1])


class SaveHalfWay(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/half.ckpt")


def test_a_resumed_run_with_dropout_equals_an_undisturbed_one(qwen3, tmp_path):
    def fresh():
        policy = CausalLM(str(qwen3), adapter=Lora(r=2, lora_dropout=0.5))
        return module(qwen3, policy, gap=GapCheck(warn=math.inf, stop=math.inf))

    whole, resumed = fresh(), fresh()
    trainer(tmp_path, callbacks=[SaveHalfWay()]).fit(whole, data(Toys(16)))
    trainer(tmp_path).fit(resumed, data(Toys(16)), ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(whole.policy), weights(resumed.policy))


def test_adapters_are_drawn_whatever_the_default_device_is(qwen3):
    """Lightning makes the model under the trainer's, where a generator of the CPU is refused."""
    policy = CausalLM(str(qwen3), adapter=Lora(r=2))
    policy.configure_model()
    before = weights(policy)
    with torch.no_grad():
        for parameter in trained_parameters(policy):
            parameter.fill_(3.0)
    with torch.device("meta"):
        policy.adapter.draw(policy.model)
    assert equal(weights(policy), before)


def test_the_flag_seeds_a_run_from_the_command_line(qwen3, tmp_path, monkeypatch):
    """Nothing else differs between the two commands."""
    from runs import ARGUMENTS
    from scsdpo.__main__ import main

    states = []
    for seed in (0, 1, 1):
        folder = tmp_path / str(len(states))
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = [f"--seed_everything={seed}", f"--model.policy.name_or_path={qwen3}"]
        monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", *ARGUMENTS, *words])
        assert main() in (0, None)
        (saved,) = folder.rglob("last.ckpt")
        states.append(torch.load(saved, weights_only=True)["state_dict"])
    assert equal(states[1], states[2]) and not equal(states[0], states[1])


def test_a_seed_is_a_number_or_auto():
    assert resolved("auto") == 0 and resolved(4) == 4
    assert Sampling(seed="auto").at(3) == Sampling(seed=0).at(3)
    assert Sampling(seed="auto").seeded(7).seed == 7 and Sampling(seed=2).seeded(7).seed == 2
