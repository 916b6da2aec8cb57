"""Prompts run once a step: the numbers of separate rows, whatever the budget, in bounded memory."""

from contextlib import nullcontext

import pytest
import torch
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.qwen3 import modeling_qwen3

from batches import double_policy, exact_norm
from scsdpo.policy import CausalLM, Lora, Rows
from scsdpo.policy.budget import peak_bytes
from scsdpo.policy.partial_attention import Blocks, Fused
from scsdpo.policy.runner import SeparateRows, SharedPrompts

BUDGETS = (1, 20, 60, 120, 400, 10**6)
"""From less than a prompt, over some that hold a question but not its demonstrations, to all."""


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    monkeypatch.setattr(modeling_olmo3.Olmo3RMSNorm, "forward", exact_norm)


def draw(generator, count):
    return tuple(torch.randint(3, 250, (count,), generator=generator).tolist())


def nested(seed=0):
    """A system turn, three questions, and under each two demonstrations; prompts of any level have
    responses, of 1 to 11 tokens, in mixed order.
    """
    generator = torch.Generator().manual_seed(seed)
    system = draw(generator, 20)
    prompts = [system, draw(generator, 5)]
    for length in (30, 17, 64):
        question = system + draw(generator, length)
        shown = [question + draw(generator, n) for n in (25, 9)]
        prompts += [question, question, *shown, shown[0]]
    order = torch.randperm(len(prompts), generator=generator).tolist()
    lengths = torch.randint(1, 12, (len(prompts),), generator=generator)
    mask = torch.arange(11) < lengths[:, None]
    ids = torch.randint(3, 250, mask.shape, generator=generator) * mask
    return Rows(prompts=[prompts[i] for i in order], ids=ids, present=mask, sampled=mask, pad_id=0)


def learn(runner, rows):
    """Run every micro-batch: hidden states by row, and how many micro-batches there were.

    The loss tells rows, places and channels apart.
    """
    states = {}

    def loss(micro, hidden):
        if not micro:  # a rank that waits for others
            return hidden.sum()
        parts = hidden.split(rows.sampled.sum(-1)[micro].tolist())
        states.update(zip(micro, (part.detach() for part in parts), strict=True))
        told = [
            torch.sin(torch.arange(part.numel()) + 7.0 * row)
            for row, part in zip(micro, parts, strict=True)
        ]
        return sum(
            (p.flatten() * w).sum() + p.square().sum() for p, w in zip(parts, told, strict=True)
        )

    micro_batches = runner.micro_batches()
    for micro in micro_batches:
        value = runner.run(micro, lambda hidden, head, micro=micro: loss(micro, hidden))
        if value.requires_grad:
            value.backward()
        runner.done(micro)
    return states, micro_batches


def gradient(policy, kind, rows, budget):
    policy.zero_grad()
    states, micro_batches = learn(kind(policy, rows, list(range(len(rows.prompts))), budget), rows)
    grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return states, grads, micro_batches


def perturbed(policy):
    """LoRA starts with B = 0: make the factors matter."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("qwen3", {}),
        ("qwen3_untied", {"gradient_checkpointing": True}),
        ("qwen3", {"adapter": Lora(r=2)}),
        ("olmo3", {}),
        ("olmo3", {"gradient_checkpointing": True}),
    ],
    ids=["tied", "checkpointed", "lora", "window", "window, checkpointed"],
)
def test_nested_prefixes_give_separate_rows_gradient_at_every_budget(
    model, settings, request, exact
):
    policy = perturbed(double_policy(request.getfixturevalue(model), **settings))
    rows = nested()
    expected, grads, _ = gradient(policy, SeparateRows, rows, 10**6)
    scale = max(grad.abs().max() for grad in grads.values())
    for budget in BUDGETS:
        states, found, micro_batches = gradient(policy, SharedPrompts, rows, budget)
        assert sorted(row for micro in micro_batches for row in micro) == sorted(expected)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert (found[name] - grad).abs().max() <= 1e-12 * scale, (budget, name)
        for row, state in expected.items():
            torch.testing.assert_close(states[row], state, rtol=1e-12, atol=1e-12)


def test_a_teacher_reads_nested_prompts_at_every_budget_and_in_any_order(qwen3, exact):
    policy, rows = double_policy(qwen3), nested()
    chosen = list(range(len(rows.prompts)))
    weights = policy.adapter.initial(policy.wrapped)
    expected, _ = learn(policy.runner(rows, chosen, 10**6, weights), rows)
    for budget in BUDGETS:
        runner = policy.runner(rows, chosen, budget, weights)
        for micro in ([0, 9], [1, 2, 3, 16], [4, 5, 6, 7, 8], list(range(10, 16))):
            hidden = runner.run(micro, lambda hidden, head: hidden)
            runner.done(micro)
            torch.testing.assert_close(hidden, torch.cat([expected[row] for row in micro]))


def tokens_run(policy, rows, budget):
    """Tokens that the decoder's forward saw in a step."""
    seen = []
    embedding = policy.language_model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    gradient(policy, SharedPrompts, rows, budget)
    hook.remove()
    return sum(seen)


def test_every_distinct_token_runs_once_and_a_prompt_that_fills_the_budget_once_more(policy):
    rows = nested()
    # A response's last token predicts nothing; under a shared start tokens are distinct once.
    starts = {prompt[:n] for prompt in rows.prompts for n in range(1, len(prompt) + 1)}
    distinct = len(starts) + int(rows.sampled.sum()) - len(rows.prompts)
    assert tokens_run(policy, rows, 10**6) == distinct
    assert tokens_run(policy, rows, 250) == distinct
    assert distinct < tokens_run(policy, rows, 20) <= distinct + len(starts)


def test_memory_is_bounded_by_the_budget_whatever_the_rollouts(qwen3):
    policy = CausalLM(str(qwen3))
    policy.configure_model()
    generator = torch.Generator().manual_seed(0)

    def peak(rollouts, budget):
        prompts = [draw(generator, 300)] * rollouts
        ids = torch.randint(3, 250, (rollouts, 40), generator=generator)
        every = torch.ones_like(ids).bool()
        rows = Rows(prompts=prompts, ids=ids, present=every, sampled=every, pad_id=0)
        policy.zero_grad()
        work = lambda: gradient(policy, SharedPrompts, rows, budget)  # noqa: E731
        return peak_bytes(work, torch.device("cpu"))

    assert peak(40, 500) < 1.1 * peak(10, 500)
    # Beyond the budget there are keys and values of the prompts, and sums of their gradients.
    fixed, a_token = policy.memory_line()
    for budget in (200, 500, 900):
        assert peak(20, budget) < 1.1 * (fixed + a_token * budget + 300 * 4 * 2 * 2 * 64 * 4)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter": Lora(r=4)}, {"gradient_checkpointing": True}],
    ids=["full", "lora", "checkpointed"],
)
def test_the_probed_line_is_what_a_step_allocates(qwen3, settings, autocast):
    policy = CausalLM(str(qwen3), **settings)
    policy.configure_model()
    generator, tokens = torch.Generator().manual_seed(0), 1024
    ids = torch.randint(3, 250, (32, 64), generator=generator)
    every = torch.ones_like(ids).bool()
    prompts = [draw(generator, 16)] * 32
    rows = Rows(prompts=prompts, ids=ids, present=every, sampled=every, pad_id=0)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        fixed, a_token = policy.memory_line()
        work = lambda: gradient(policy, SharedPrompts, rows, tokens)  # noqa: E731
        peak = peak_bytes(work, torch.device("cpu"))
    assert fixed + a_token * tokens == pytest.approx(peak, rel=0.1)


def test_probing_leaves_gradients_and_draws_alone(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(r=2, lora_dropout=0.5))
    policy.configure_model()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert policy.token_budget() == 1024
    torch.testing.assert_close(torch.rand(2), expected)
    assert all(parameter.grad is None for parameter in policy.parameters())


def parts(seen, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask = mask.tril() if seen is True else mask
    return inputs, mask if isinstance(seen, bool) else seen


@pytest.mark.parametrize("kernel", [Fused(), Blocks()], ids=["fused", "blocks"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("table", [2**26, 1000], ids=["one block", "several"])
def test_a_kernel_is_softmax_attention_and_its_gradient(kernel, causal, table, monkeypatch):
    monkeypatch.setattr("scsdpo.policy.partial_attention.TABLE_BYTES", table)
    inputs, mask = parts(causal)
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs, mask, scale=1.0, enable_gqa=True
    )
    detached = tuple(x.detach() for x in inputs)
    out, lse = kernel.forward(*detached, causal)
    torch.testing.assert_close(out, expected)
    scores = inputs[0].detach() @ inputs[1].detach().repeat_interleave(2, 1).mT
    torch.testing.assert_close(lse, scores.masked_fill(~mask, -torch.inf).logsumexp(-1))
    grad = torch.randn_like(expected)
    for found, wanted in zip(
        kernel.backward(grad, detached, (out, lse), causal),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_a_query_that_sees_no_key_has_no_weight():
    seen = torch.ones(1, 9, 9, dtype=torch.bool).tril(-1)
    inputs, _ = parts(seen)
    out, lse = Blocks().forward(*inputs, seen)
    assert bool((out[:, :, 0] == 0).all()) and bool((lse[:, :, 0] == -torch.inf).all())
    assert out.isfinite().all()
