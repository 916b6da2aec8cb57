"""LoRA's adapter alone, beside base weights that vLLM got once."""

import pytest
import torch
from adapters import SAMPLING, check_sample, check_steps
from policies import lora_policy, move, short_and_long

from models import olmo3_folder, qwen3_folder
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.rollout import Colocated, VLLMRollout, WeightReceiver
from scsdpo.rollout.weights import files

KINDS = {
    "all": {},
    "rslora": {"use_rslora": True, "r": 12, "lora_alpha": 5},
    "a part of what is fused": {"target_modules": ["q_proj", "up_proj"]},
    "one layer": {"layers_to_transform": [1], "target_modules": ["v_proj", "down_proj"]},
    "sliding": {},
}


def engine(adapter="auto"):
    return Colocated(max_model_len=512, kv_cache_gib=0.25, enforce_eager=True, adapter=adapter)


@pytest.fixture
def loads(monkeypatch):
    """How many weights came in each load of the worker."""
    counts = []
    load = WeightReceiver.scsdpo_load

    def counted(worker, weights):
        passed = list(weights)
        counts.append(len(passed))
        return load(worker, iter(passed))

    monkeypatch.setattr(WeightReceiver, "scsdpo_load", counted)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_alone_is_the_policy_at_every_step(tmp_path, loads, kind):
    """The long prompt would be read from the old adapter's prefix cache."""
    policy = lora_policy(
        (olmo3_folder if kind == "sliding" else qwen3_folder)(tmp_path), **KINDS[kind]
    )
    rollout = VLLMRollout(engine())
    check_steps(rollout, policy, steps=3)
    assert len(loads) == 1  # the base


def test_merged_is_the_policy_too_and_brings_all_weights_each_time(tmp_path, loads):
    policy, rollout = lora_policy(qwen3_folder(tmp_path)), VLLMRollout(engine("merged"))
    check_steps(rollout, policy, steps=2)
    assert len(loads) == 2


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    policy = lora_policy(qwen3_folder(tmp_path_factory.mktemp("policy")))
    rollout = VLLMRollout(engine("alone"))
    yield policy, rollout
    rollout.close()


def test_another_adapter_than_was_sent_is_refused_and_the_next_one_heals(case, monkeypatch):
    policy, rollout = case
    move(policy, 5, 0.01)
    with monkeypatch.context() as harmed:

        def written(values, path):
            name = next(iter(values))
            save(values | {name: values[name] * 1.5}, path)

        save = files.save_file
        harmed.setattr(files, "save_file", written)
        with pytest.raises(TrainingStopped, match=r"holds another adapter \(.*\) than was sent"):
            rollout.sample(policy, short_and_long(policy), SAMPLING)
    check_sample(rollout, policy)


def test_an_adapter_that_was_not_loaded_is_refused(case, monkeypatch):
    policy, rollout = case
    check_sample(rollout, policy)
    move(policy, 6, 0.01)
    with monkeypatch.context() as idle:
        idle.setattr(rollout.engine._llm.llm_engine, "add_lora", lambda request: True)
        with pytest.raises(TrainingStopped, match="holds another adapter"):
            rollout.sample(policy, short_and_long(policy), SAMPLING)
    check_sample(rollout, policy)


def test_another_base_is_brought_too(case, loads):
    policy, rollout = case
    check_sample(rollout, policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("o_proj.base_layer.weight"):
                parameter.mul_(1.2)
    rollout.versions.moved()
    check_sample(rollout, policy)
    assert len(loads) == 1


def test_layers_that_vllm_cannot_adapt_are_refused(case, monkeypatch):
    policy, rollout = case
    check_sample(rollout, policy)
    move(policy, 7, 0.01)
    monkeypatch.setattr(rollout.engine, "_supported", ["q_proj"])
    with pytest.raises(
        ConfigurationError, match=r"adapter\.target_modules: vLLM does not support adapters"
    ):
        rollout.sample(policy, short_and_long(policy), SAMPLING)
