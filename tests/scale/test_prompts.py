"""Ranks that have different rows, prompts and micro-batches give the gradient of one process."""

import pytest
import torch
from prompts import BUDGETS, POLICIES, SPLITS
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.qwen3 import modeling_qwen3

from batches import double_policy, exact_norm
from conftest import HERE, ranks
from scsdpo.policy.runner import SeparateRows
from test_shared_prompts import gradient, nested


@pytest.fixture(scope="session")
def shared_out(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("prompts") / "out"
    ranks([HERE / "prompts.py"], 2, folders, out)
    return torch.load(out)


@pytest.mark.parametrize("name", POLICIES)
def test_two_ranks_give_the_gradient_of_one(folders, shared_out, name, monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    monkeypatch.setattr(modeling_olmo3.Olmo3RMSNorm, "forward", exact_norm)
    folder, settings, tolerance = POLICIES[name]
    policy = double_policy(folders / folder, **settings)
    policy.language_model.set_experts_implementation("eager")
    _, expected, _ = gradient(policy, SeparateRows, nested(), 10**6)
    scale = max(grad.abs().max() for grad in expected.values())
    for split in SPLITS:
        for budget in BUDGETS:
            grads = shared_out[name, split, budget]
            assert grads.keys() == expected.keys()
            for key, grad in expected.items():
                assert (grads[key] - grad).abs().max() <= tolerance * scale, (split, budget, key)
