"""Linear attention and convolution over a tree of segments: the numbers of each row alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

import batches
import models
from batches import METHODS, double_policy, parts
from batches import gradient as step_gradient
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora, Rows, segment_states
from scsdpo.policy.budget import peak_bytes
from scsdpo.policy.row_path import RowPath
from scsdpo.policy.runner import SeparateRows, SharedPrompts
from scsdpo.policy.segment_states import DeltaInputs, SegmentStates, Span, delta_rule_one
from table_policy import with_a_tool
from test_shared_prompts import gradient, learn, nested, perturbed

PROJECTIONS = r".*\.(in_proj\w*|out_proj)"
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
    state = state if initial_state is None else initial_state
    outputs = []
    for t in range(value.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = torch.einsum("bhde,bhd->bhe", state, key[:, t])
        new = beta[:, t, :, None] * (value[:, t] - read)
        state = state + torch.einsum("bhd,bhe->bhde", key[:, t], new)
        outputs.append(torch.einsum("bhde,bhd->bhe", state, query[:, t]))
    return torch.stack(outputs, 1), state


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
    assert policy.share_prefixes
    return policy


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"adapter": Lora(r=2, target_modules=PROJECTIONS)}],
    ids=["full", "checkpointed", "lora"],
)
def test_states_go_on_to_what_is_below_and_gradients_come_back_at_any_budget(
    folder, settings, exact
):
    policy, rows = exact_policy(folder, **settings), nested()
    expected, grads, _ = gradient(policy, SeparateRows, rows, 10**6)
    scale = max(grad.abs().max() for grad in grads.values())
    for budget in (20, 10**6):
        states, found, _ = gradient(policy, SharedPrompts, rows, budget)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert (found[name] - grad).abs().max() <= 1e-11 * scale, (budget, name)
        for row, state in expected.items():
            torch.testing.assert_close(states[row], state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_what_other_rows_say_moves_a_row_by_nothing(name, request):
    policy = CausalLM(str(request.getfixturevalue(name)))
    policy.configure_model()
    rows = nested()
    changed = 4
    others = replace(rows, ids=rows.ids.clone())
    others.ids[changed] = (rows.ids[changed] + 7) % 250
    every = list(range(len(rows.prompts)))
    before, _ = learn(policy.runner(rows, every, 10**6), rows)
    after, _ = learn(policy.runner(others, every, 10**6), others)
    assert not torch.equal(before[changed], after[changed])
    assert all(torch.equal(before[row], after[row]) for row in every if row != changed)


@pytest.mark.parametrize("kind", ["one turn", "episodes"])
@pytest.mark.parametrize("method", ["sc-sdpo", "grpo"])
def test_a_step_is_that_of_rows_apart_and_its_teacher_follows(
    qwen3_5, method, kind, exact, monkeypatch
):
    """SC-SDPO's teacher is an average that reads demonstrations: a copy of the model. In an episode
    states go on through what a tool said.
    """
    if kind == "episodes":
        plain = batches.judged
        monkeypatch.setattr(batches, "judged", lambda policy: with_a_tool(plain(policy)))
    policy = exact_policy(qwen3_5)
    advantage, settings = METHODS[method]()
    batch, update = parts(policy, advantage, **settings)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    update.teacher.after_step(policy)
    loss, grads, _ = step_gradient(policy, batch, update, budget=100)
    policy.run_rows(RowPath.PADDED, "a test")
    apart, expected, _ = step_gradient(policy, batch, update)
    assert loss == pytest.approx(apart, rel=1e-10)
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() <= 1e-9 * scale, name


def test_packed_rows_take_no_more_memory_than_rows_apart(tmp_path):
    """Of the default budget of CPU in small: packed rows fill it, and of rows apart one fits."""
    wide = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    config = Qwen3_5TextConfig(
        **models._common(tie=True, vocab=models.TOKENS) | models._DELTA | wide | heads | sizes
    )
    policy = CausalLM(
        str(models._save(tmp_path, Qwen3_5ForCausalLM, config, dtype=torch.float32, seed=0))
    )
    policy.configure_model()
    ids = torch.randint(3, 250, (8, 32))
    every = torch.ones_like(ids).bool()
    prompt = tuple(torch.randint(3, 250, (125,)).tolist())
    rows = Rows(prompts=[prompt] * 8, ids=ids, present=every, sampled=every, pad_id=0)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def peak(kind):
        runner = kind(policy, rows, range(8), 256)
        return peak_bytes(lambda: learn(runner, rows), torch.device("cpu"))

    assert peak(SharedPrompts) < 0.95 * peak(SeparateRows)


TREE = (
    Span(0, 70, above=None),
    Span(70, 1, above=0),
    Span(71, 130, above=1),
    Span(201, 2, above=0),
    Span(203, 5, above=None, earlier=1),
    Span(208, 20, above=4),
    Span(228, 3, above=None, earlier=0),
    Span(231, 3, above=None),
)
"""Longer and shorter than a chunk and than a convolution; below one another; after earlier states;
six places at the end belong to none."""
ENDS = 240


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def paths():
    """By span, the spans from the root to it, and the earlier state they begin with."""
    for span in TREE:
        path = [span]
        while path[0].above is not None:
            path.insert(0, TREE[path[0].above])
        places = [p for each in path for p in range(each.start, each.start + each.length)]
        yield path[0].earlier, torch.tensor(places), span.length


@pytest.mark.parametrize("way", ["_delta_rule", "_delta_rule_by_levels"])
def test_the_delta_rule_of_a_tree_is_that_of_each_path_token_by_token(way, monkeypatch):
    """`by_levels` is tested with a stand-in for the kernel that CUDA would run."""
    torch.manual_seed(0)
    inputs = DeltaInputs(
        query=drawn(ENDS, 2, 8),
        key=drawn(ENDS, 2, 8),
        value=drawn(ENDS, 4, 5),
        decay=drawn(ENDS, 4),
        rate=drawn(ENDS, 4),
    )
    before = drawn(2, 4, 8, 5)
    raw = [*inputs, before]
    inputs = inputs._replace(decay=-inputs.decay.exp(), rate=inputs.rate.sigmoid())
    states = SegmentStates(TREE, ENDS, torch.device("cpu"))
    monkeypatch.setattr("scsdpo.policy.segment_states.import_module", lambda _: Kernel)
    mixed, ends = getattr(states, way)(inputs, before, True)
    found, wanted = [], []
    for number, (earlier, places, length) in enumerate(paths()):
        q, k, v, g, b = (x[None, places] for x in inputs)
        q, k = (x.repeat_interleave(2, 2) for x in (q, k))
        start = None if earlier is None else before[earlier : earlier + 1]
        expected, end = token_by_token(q, k, v, g=g, beta=b, initial_state=start)
        found += [mixed[places[-length:]], ends[number]]
        wanted += [expected[0, -length:], end[0]]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    told = [torch.randn_like(x) for x in wanted]
    grads = [
        torch.autograd.grad(values, raw, told, retain_graph=True) for values in (found, wanted)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class Kernel:
    """flash-linear-attention's contract: rows end to end, borders, one first state a row."""

    @staticmethod
    def chunk_gated_delta_rule(q, k, v, *, g, beta, initial_state, cu_seqlens, **settings):
        assert settings == {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        made = [
            token_by_token(
                *(x[:, start:end] for x in (q, k, v)),
                g=g[:, start:end],
                beta=beta[:, start:end],
                initial_state=initial_state[i : i + 1],
            )
            for i, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        return torch.cat([out for out, _ in made], 1), torch.cat([state for _, state in made])


class Convolution:
    """causal-conv1d's contract of `causal_conv1d_fn(x, weight, bias)`, and whether it was called.

    Rows [B, C, n] with channels contiguous must have strides in eights; an output stands at the
    last of its inputs, and before the first of them are zeros.
    """

    calls = 0

    @classmethod
    def causal_conv1d_fn(cls, x, weight, bias=None):
        cls.calls += 1
        channels, width = weight.shape
        assert x.dim() == 3 and x.shape[1] == channels and 2 <= width <= 4
        assert bias is None or (bias.shape == (channels,) and bias.stride(-1) == 1)
        assert x.stride(1) == 1 and x.stride(2) % 8 == x.stride(0) % 8 == 0
        assert x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
        made = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=8)
        return made[..., : x.shape[-1]]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_the_convolution_of_a_tree_is_that_of_each_path(width, kernel, monkeypatch):
    """With a stand-in for the kernel that CUDA would run, too."""
    if kernel:
        monkeypatch.setattr(segment_states, "_has", lambda package, _: package == "causal_conv1d")
        monkeypatch.setattr(segment_states, "import_module", lambda _: Convolution)
        monkeypatch.setattr(Convolution, "calls", 0)
    torch.manual_seed(0)
    inputs, weight, bias = drawn(ENDS, 8), drawn(8, width), drawn(8)
    before = drawn(2, width - 1, 8)
    states = SegmentStates(TREE, ENDS, torch.device("cpu"))
    mixed, ends = states.convolve(inputs, weight, bias, before)
    found, wanted = [], []
    for number, (earlier, places, length) in enumerate(paths()):
        history = torch.zeros_like(before[0]) if earlier is None else before[earlier]
        row = torch.cat([history, inputs[places]])
        expected = sum(row[j : len(row) - width + 1 + j] * weight[:, j] for j in range(width))
        found += [mixed[places[-length:]], ends[number]]
        wanted += [(expected + bias)[-length:], row[len(row) - width + 1 :]]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    told = [torch.randn_like(x) for x in wanted]
    grads = [
        torch.autograd.grad(values, [inputs, weight, bias], told, retain_graph=True)
        for values in (found, wanted)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert not kernel or Convolution.calls == (width > 1)


def test_a_token_after_another_is_a_row():
    torch.manual_seed(0)
    shapes = (3, 7, 2, 8), (3, 7, 2, 8), (3, 7, 4, 5), (3, 7, 4), (3, 7, 4)
    q, k, v, g, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    g, b = -g.exp(), b.sigmoid()
    heads = (x.repeat_interleave(2, 2) for x in (q, k))
    expected, last = token_by_token(*heads, v, g=g, beta=b)
    state = torch.zeros_like(last)
    for t in range(7):
        mixed = delta_rule_one(DeltaInputs(*(x[:, t] for x in (q, k, v, g, b))), state)
        torch.testing.assert_close(mixed, expected[:, t])
    torch.testing.assert_close(state, last)


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory):
    """Qwen3.5 as the hub has it: a model of pictures and text."""
    path = tmp_path_factory.mktemp("with_pictures")
    text = models._common(tie=True, vocab=models.TOKENS + 5) | models._DELTA
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen3_5Config(
        text_config=text | {"num_hidden_layers": 4},
        vision_config=sizes | {"patch_size": 4, "out_hidden_size": 32},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config).eval()
    model.save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    return path, model


def test_of_a_model_with_pictures_the_text_is_trained_exported_and_read_again(
    with_pictures, tmp_path
):
    path, model = with_pictures
    policy = CausalLM(str(path))
    policy.configure_model()
    ids = torch.randint(3, 250, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(policy.language_model(ids).logits, expected)
        policy.language_model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, expected)
    assert policy.share_prefixes
    _, grads, _ = gradient(policy, SharedPrompts, nested(), 10**6)
    assert grads.keys() == dict(policy.named_parameters()).keys()


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path):
    """transformers would draw it at random, and warn."""
    from safetensors.torch import load_file, save_file

    folder = models.lfm2_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.conv.other"] = weights.pop("model.layers.1.conv.conv.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = CausalLM(str(folder))
    with pytest.raises(ConfigurationError, match=r"lacks model\.layers\.1\.conv\.conv\.weight"):
        policy.configure_model()
