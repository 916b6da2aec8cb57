"""What another engine gets of the policy, and how it knows that it changed."""

import copy

import pytest
import torch

from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout.weights.hashing import weights_digest
from scsdpo.rollout.weights.stream import merged_weights


def load(folder, **kwargs):
    policy = CausalLM(str(folder), **kwargs)
    policy.configure_model()
    return policy


def step(policy, make):
    """One optimizer step on what is trained."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    make(parameters).step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-6),
        # This one writes without bumping the tensors' version counters.
        lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-6),
    ],
    ids=["adamw", "fused", "sgd"],
)
@pytest.mark.parametrize("adapter", [{}, {"adapter": Lora(r=2)}], ids=["full", "lora"])
def test_every_optimizer_step_changes_the_digest(qwen3, make, adapter):
    policy = load(qwen3, **adapter)
    first = weights_digest(policy)
    assert weights_digest(policy) == first == weights_digest(copy.deepcopy(policy))
    step(policy, make)
    assert weights_digest(policy) != first


def test_weights_that_are_all_equal_change_the_digest_too(qwen3):
    """The exclusive or of an even number of equal values is 0, whatever they are."""
    policy = load(qwen3)
    first = weights_digest(policy)
    with torch.no_grad():
        policy.language_model.get_decoder().norm.weight.fill_(0.999)
    assert weights_digest(policy) != first


@pytest.mark.parametrize("folder", ["qwen3", "qwen3_untied", "olmo3"])
def test_weights_are_those_of_the_checkpoint_by_its_names(folder, request):
    policy = load(request.getfixturevalue(folder))
    weights = dict(merged_weights(policy))
    state = policy.language_model.state_dict()
    missing = set(state) - set(weights)
    assert missing == (set() if folder != "qwen3" else {"lm_head.weight"})  # tied
    for name, value in weights.items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_merged_weights_do_what_the_adapted_model_does(qwen3, settings):
    policy = load(qwen3, adapter=Lora(r=4, lora_dropout=0.3, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zeros at the start: nothing to merge
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    before = weights_digest(policy)
    weights = dict(merged_weights(policy))
    assert weights_digest(policy) == before
    plain = load(qwen3)
    with_none_left = plain.language_model.load_state_dict(weights, strict=False)
    assert with_none_left.missing_keys == ["lm_head.weight"]  # tied
    assert not with_none_left.unexpected_keys
    ids = torch.arange(3, 60)[None]
    with policy.sampling_mode() as adapted, plain.sampling_mode() as merged:
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        untrained = load(qwen3).language_model(ids).logits
        assert (adapted(ids).logits - untrained).abs().max() > 0.1
