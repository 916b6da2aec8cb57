"""Linear attention and convolution over a tree of segments: the numbers of each row alone."""

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from batches import double_policy
from scsdpo.policy import Lora
from scsdpo.policy.runner import SeparateRows, SharedPrompts
from test_shared_prompts import gradient, nested, perturbed

PROJECTIONS = ["in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_a", "in_proj", "out_proj"]
FAMILIES = ("qwen3_5", "qwen3_next", "lfm2")


@pytest.fixture(params=FAMILIES)
def folder(request):
    return request.getfixturevalue(request.param)


def token_by_token(
    query, key, value, *, g, beta, initial_state=None, output_final_state=False, **_
):
    """The gated delta rule as it is written, in the dtype of its inputs."""
    unit = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)  # noqa: E731
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    state = value.new_zeros(*value.shape[:1], value.shape[2], key.shape[-1], value.shape[-1])
    outputs = []
    for t in range(value.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = torch.einsum("bhde,bhd->bhe", state, key[:, t])
        new = beta[:, t, :, None] * (value[:, t] - read)
        state = state + torch.einsum("bhd,bhe->bhde", key[:, t], new)
        outputs.append(torch.einsum("bhde,bhd->bhe", state, query[:, t]))
    return torch.stack(outputs, 1), None


@pytest.fixture
def exact(monkeypatch):
    """transformers in float64 throughout, its delta rule token by token."""
    plain, softmax = Tensor.to, torch.nn.functional.softmax

    def to(self, *args, **kwargs):
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dtype, dim: softmax(x, dim))
    for modeling in (modeling_qwen3_5, modeling_qwen3_next):
        monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", token_by_token)


def exact_policy(folder, **settings):
    policy = perturbed(double_policy(folder, **settings))
    policy.language_model.set_experts_implementation("eager")  # grouped products know no float64
    return policy


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"adapter": Lora(r=2, target_modules=PROJECTIONS)}],
    ids=["full", "checkpointed", "lora"],
)
def test_states_go_on_to_what_is_below_and_gradients_come_back_at_any_budget(
    folder, settings, exact
):
    policy = exact_policy(folder, **settings)
    rows = nested()
    expected, grads, _ = gradient(policy, SeparateRows, rows, 10**6)
    scale = max(grad.abs().max() for grad in grads.values())
    for budget in (1, 60, 10**6):
        states, found, _ = gradient(policy, SharedPrompts, rows, budget)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            error = (found[name] - grad).abs().max()
            assert error <= 1e-11 * scale, (budget, name)
        for row, state in expected.items():
            torch.testing.assert_close(states[row], state, rtol=1e-11, atol=1e-11)
