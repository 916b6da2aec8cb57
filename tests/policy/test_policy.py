"""The policy: shared prefixes, adapters, what is saved, and what is refused."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch

from models import qwen3_folder
from scsdpo.policy import CausalLM, Lora, Rows
from scsdpo.policy.adapter import STUDENT
from scsdpo.policy.rows import separate_rows
from scsdpo.policy.runner import SeparateRows, SharedPrompts
from scsdpo.policy.tree import SHORTEST_SHARED, prefix_tree
from scsdpo.rollout import HFRollout
from scsdpo.types import Prompt, Sampling
from scsdpo.verifiers import ExactMatch


def rows(seed=0):
    """Five responses of lengths 1..6 to three prompts, one of them longer than OLMo's window."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return tuple(torch.randint(3, 250, (n,), generator=generator).tolist())

    prompts = [draw(20), draw(3), draw(11)]
    lengths = torch.tensor([6, 2, 1, 5, 3])
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.randint(3, 250, (5, 6), generator=generator) * mask
    return Rows(
        prompts=[prompts[i] for i in (0, 1, 0, 2, 0)], ids=ids, present=mask, sampled=mask, pad_id=0
    )


def load(path, **kwargs):
    policy = CausalLM(str(path), **kwargs)
    policy.configure_model()
    return policy


def gradient(policy, share, start=0):
    """Hidden states and the gradient of a function of them; all prompts begin with `start` ids."""
    batch = rows()
    common = tuple(range(40, 40 + start))
    batch = replace(batch, prompts=[common + prompt for prompt in batch.prompts])
    chosen = list(range(len(batch.prompts)))
    runner = (SharedPrompts if share else SeparateRows)(policy, batch, chosen, 10**6)
    hidden = runner.run(chosen, lambda hidden, head: hidden)
    loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
    policy.zero_grad()
    loss.backward()
    runner.done(chosen)
    return hidden.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", ["qwen3", "qwen3_untied", "olmo3"])
@pytest.mark.parametrize("start", [0, 1, 25], ids=lambda n: f"{n} tokens shared by all")
def test_shared_prefixes_equal_separate_rows_gradient_included(model, start, request):
    policy = load(request.getfixturevalue(model))
    hidden, grads = gradient(policy, False, start)
    shared_hidden, shared_grads = gradient(policy, True, start)
    assert hidden.shape == (17, hidden.shape[1])
    torch.testing.assert_close(shared_hidden, hidden, rtol=1e-5, atol=1e-5)
    assert grads.keys() == shared_grads.keys()
    for name, grad in grads.items():
        error = (grad - shared_grads[name]).norm() / grad.norm().clamp(min=1e-6)
        assert error < 1e-5, name


def test_separate_rows_equal_the_model_on_one_unpadded_sequence(policy):
    batch = rows()
    flat = separate_rows(policy.language_model, batch)
    start = 0
    for prompt, ids, n in zip(
        batch.prompts, batch.ids, batch.sampled.sum(-1).tolist(), strict=True
    ):
        sequence = torch.tensor([[*prompt, *ids[:n].tolist()]])
        alone = policy.language_model.get_decoder()(sequence).last_hidden_state[0]
        expected = alone[len(prompt) - 1 : len(prompt) + n - 1]
        torch.testing.assert_close(flat[start : start + n], expected, rtol=1e-4, atol=1e-5)
        start += n


def test_gradient_checkpointing_keeps_the_numbers(qwen3):
    plain, checkpointed = load(qwen3), load(qwen3, gradient_checkpointing=True)
    checkpointed.train()
    _, expected = gradient(plain, plain.share_prefixes)
    _, grads = gradient(checkpointed, checkpointed.share_prefixes)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4)


def forward(policy, start=0):
    """As `gradient`, through the policy's own forward."""
    common = tuple(range(40, 40 + start))
    batch = replace(rows(), prompts=[common + prompt for prompt in rows().prompts])
    policy.zero_grad()
    chosen = list(range(len(batch.prompts)))
    runner = policy.runner(batch, chosen, 10**6)
    runner.run(chosen, lambda hidden, head: hidden.square().mean()).backward()
    runner.done(chosen)
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_layers_keep_the_numbers_and_serve_every_layout(qwen3):
    plain = load(qwen3)
    compiled = load(qwen3, compile_layers=True, gradient_checkpointing=True)
    for start in (0, 1, 25):
        grads = forward(compiled, start)
        for name, grad in forward(plain, start).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    forward(compiled, 40)
    sampling = Sampling(n=2, max_new_tokens=4)
    prompt = Prompt(key="0", messages=(), verifier=ExactMatch(), answer="", ids=(5, 6, 7))
    HFRollout().sample(compiled, [prompt], sampling)
    assert 0 < graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_layers_are_compiled_once_in_copies_too(qwen3):
    compiled = load(qwen3, compile_layers=True)
    compiled._ready(compiled.language_model)
    compiled._ready(copied := copy.deepcopy(compiled.language_model))
    kinds = {type(layer) for model in (compiled.model, copied) for layer in model.model.layers}
    assert [kind.__name__ for kind in kinds] == ["CompiledQwen3DecoderLayer"]


def test_configure_model_twice_changes_nothing(policy):
    before = policy.model
    policy.configure_model()
    assert policy.model is before


def perturb_student(policy, scale=0.1):
    """LoRA starts with B = 0: make the factors matter."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if f".{STUDENT}." in name:
                parameter.add_(scale * torch.randn_like(parameter))


def run(policy, weights):
    """Hidden states of all rows under a set of weights."""
    chosen = list(range(len(rows().prompts)))
    return policy.runner(rows(), chosen, 10**6, weights).run(chosen, lambda hidden, head: hidden)


def test_lora_trains_factors_only_in_float32(qwen3):
    policy = load(qwen3, adapter=Lora(r=4))
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_lora_initial_weights_are_the_base_with_adapters_off(qwen3):
    policy, plain = load(qwen3, adapter=Lora(r=4)), load(qwen3)
    perturb_student(policy)
    expected = run(plain, plain.adapter.current())
    initial = run(policy, policy.adapter.initial(policy.wrapped))
    student = run(policy, policy.adapter.current())
    torch.testing.assert_close(initial, expected)
    assert not torch.allclose(student, expected)


def test_a_moving_lora_copy_starts_as_the_student_and_stays_when_it_moves(qwen3):
    policy = load(qwen3, adapter=Lora(r=4))
    perturb_student(policy)
    moving = policy.adapter.moving(policy.wrapped, "teacher")
    student = run(policy, policy.adapter.current())
    before = run(policy, moving)
    torch.testing.assert_close(before, student)
    perturb_student(policy)
    after = run(policy, moving)
    torch.testing.assert_close(after, before)


def test_running_a_lora_teacher_leaves_the_student_trainable(qwen3):
    """`set_adapter` and `disable_adapter` flip requires_grad: no error, and no gradient."""
    policy = load(qwen3, adapter=Lora(r=4, lora_dropout=0.1))
    moving = policy.adapter.moving(policy.wrapped, "teacher")
    policy.train()
    run(policy, moving)
    run(policy, policy.adapter.initial(policy.wrapped))
    assert policy.language_model.training
    _, grads = gradient(policy, True)
    assert grads and all(f".{STUDENT}." in name for name in grads)
    assert all(not p.requires_grad for n, p in policy.named_parameters() if ".teacher." in n)


def test_checkpoints_hold_lora_factors_and_not_the_base(qwen3):
    policy = load(qwen3, adapter=Lora(r=4))
    assert policy.state_dict() and all("lora_" in key for key in policy.state_dict())
    assert len(load(qwen3).state_dict()) > 10


def test_several_end_of_sequence_ids_are_read(policy):
    assert policy.chat.eos_ids == (2, 0)


def test_ids_beyond_the_tokenizer_decode_to_nothing(policy):
    assert policy.vocabulary > len(policy.chat.tokenizer)
    ids = [*policy.chat.encode("hi"), policy.vocabulary - 1]
    assert policy.chat.decode(ids) == "hi"


def test_a_missing_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"CausalLM\(name_or_path='.*nowhere'\)`: there is no such folder"
    ):
        CausalLM(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    folder = qwen3_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        CausalLM(str(folder))


def test_rescaled_logits_are_refused(tmp_path):
    import json

    folder = qwen3_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load(folder)


def test_every_common_start_is_one_segment_and_short_ones_are_not_shared():
    long, short = tuple(range(100, 100 + SHORTEST_SHARED)), (1, 2, 3)
    prompts = [(*long, 7, 8), (*long, 9), long, (*short, 4), (*short, 5), (*long, 7, 8)]
    roots, ends = prefix_tree(prompts, 1000)
    assert set(ends) == set(prompts)
    for prompt, end in ends.items():
        assert tuple(i for segment in end.line for i in segment.ids) == prompt
    assert sum(root.tokens() for root in roots) == len(long) + 2 + 1 + 4 + 4


def test_sampling_under_autocast_casts_linear_layers_once_and_shares_the_rest(qwen3):
    policy = load(qwen3)
    model, ids = policy.language_model, torch.arange(3, 13)[None]
    with policy.sampling_mode() as plain:
        assert plain is model
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with policy.sampling_mode() as ready:
            linear = [m for m in ready.modules() if isinstance(m, torch.nn.Linear)]
            assert {m.weight.dtype for m in linear} == {torch.bfloat16} and len(linear) > 10
            assert ready.get_input_embeddings().weight is model.get_input_embeddings().weight
            assert not ready.training
            found = ready(input_ids=ids).logits
        with torch.no_grad():
            expected = model.eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.parameters())


def test_sampling_casts_nothing_where_a_copy_does_not_fit(qwen3, monkeypatch):
    policy = load(qwen3)
    monkeypatch.setattr("scsdpo.policy.causal_lm.free_bytes", lambda device: 1000)
    with torch.autocast("cpu", torch.bfloat16), policy.sampling_mode() as ready:
        assert ready is policy.language_model


def test_compile_layers_says_when_nothing_is_compiled(qwen3):
    policy = load(qwen3, compile_layers=True)
    ids = torch.arange(3, 13)[None]
    with torch.compiler.set_stance("force_eager"):
        run = lambda: policy(lambda model: model(input_ids=ids).logits.shape)  # noqa: E731
        run()
        with pytest.warns(UserWarning, match="compile_layers: torch compiled nothing"):
            run()
        run()  # and says it once
