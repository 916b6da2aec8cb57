"""Mixtures of experts: packing, shared prompts, sampling, files, and what a run measures."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expert_models import CONFIGS, expert_folder
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.shard_loading import as_stored, load_shards
from scsdpo.rollout.weights.stream import base_weights, merged_weights

EACH = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: expert_folder(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}


def load(folder, **settings):
    policy = CausalLM(str(folder), **settings)
    policy.configure_model()
    return policy


@EACH
def test_weights_go_out_by_the_names_of_the_checkpoint_and_come_in_by_them(kind, folders):
    stored = load_file(folders[kind] / "model.safetensors")
    policy = load(folders[kind], adapter=Lora(r=2))
    full = load(folders[kind])
    for weights in (
        merged_weights(full),
        merged_weights(policy, torch.float32),
        base_weights(policy, torch.float32),
    ):
        sent = dict(weights)
        assert sent.keys() == stored.keys()
        assert all(torch.equal(sent[name], stored[name]) for name in stored)
    empty = AutoModelForCausalLM.from_config(CONFIGS[kind])
    load_shards(empty, str(folders[kind]))
    for name, value in full.language_model.named_parameters():
        assert torch.equal(dict(empty.named_parameters())[name], value)
    assert as_stored(full.language_model, [])
