"""Prompts run once a step: the numbers of separate rows, whatever the budget, in bounded memory."""

import sys
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.qwen3 import modeling_qwen3

from batches import double_policy, exact_norm
from scsdpo.policy import CausalLM, Lora, Rows, runner, segment_attention, tree
from scsdpo.policy.budget import peak_bytes
from scsdpo.policy.layout import PackedSegments
from scsdpo.policy.partial_attention import Blocks, Flash, Fused, Runs
from scsdpo.policy.runner import SeparateRows, SharedPrompts

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from flash_on_cpu import emulated_flash

BUDGETS = (1, 20, 60, 120, 400, 10**6)
"""From less than a prompt, over some that hold a question but not its demonstrations, to all."""


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    monkeypatch.setattr(modeling_olmo3.Olmo3RMSNorm, "forward", exact_norm)


@pytest.fixture(autouse=True)
def short_starts_are_shared(monkeypatch):
    """From 16 tokens on, so that small trees are deep."""
    monkeypatch.setattr(tree, "SHORTEST_SHARED", 16)
    monkeypatch.setattr(runner, "SHORTEST_SHARED", 16)


@pytest.fixture
def flash():
    with emulated_flash():
        yield


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


@pytest.mark.parametrize("model", ["qwen3", "olmo3"])
@pytest.mark.parametrize("kernel", [Blocks, Flash])
def test_flash_and_blocks_give_separate_rows_gradient_too(
    model, kernel, request, exact, flash, monkeypatch
):
    def choose(query, of):
        return kernel() if of.causal or of.window is None else Blocks()

    policy = double_policy(request.getfixturevalue(model))
    rows = nested()
    _, grads, _ = gradient(policy, SeparateRows, rows, 10**6)
    monkeypatch.setattr(segment_attention, "kernel", choose)
    scale = max(grad.abs().max() for grad in grads.values())
    for budget in (60, 10**6):
        _, found, _ = gradient(policy, SharedPrompts, rows, budget)
        for name, grad in grads.items():
            assert (found[name] - grad).abs().max() <= 1e-12 * scale, (budget, name)


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


def runs(queries, keys, *, causal=False, window=None, gap=0):
    """Runs of so many queries and keys; queries begin `gap` after the last key of theirs, if they
    are not the keys."""
    starts = [list(accumulate(lengths, initial=0)) for lengths in (queries, keys)]
    of = [torch.arange(n) for n in keys]
    at = [torch.arange(n) + (0 if causal else t + gap) for n, t in zip(queries, keys, strict=True)]
    return Runs(
        queries=starts[0],
        keys=starts[1],
        query_starts=torch.tensor(starts[0]).int(),
        key_starts=torch.tensor(starts[1]).int(),
        at=torch.cat(at),
        of=torch.cat(of),
        causal=causal,
        window=window,
    )


def states(queries, keys):
    """Float64 queries of 4 heads of 8, keys and values of 2."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), 4, 8), (sum(keys), 2, 8), (sum(keys), 2, 8)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def plain(query, key, value, seen):
    """Softmax attention by its formula, one table of scores for all runs."""
    scores = torch.einsum("nhd,thd->hnt", query, key.repeat_interleave(2, 1))
    scores = scores.masked_fill(~seen, -torch.inf)
    mixed = torch.einsum("hnt,thd->nhd", scores.softmax(-1), value.repeat_interleave(2, 1))
    return mixed, scores.logsumexp(-1)


def sight(of):
    """[N, T] bool: who sees whom."""
    numbers = [
        torch.repeat_interleave(torch.arange(len(s) - 1), torch.tensor(s).diff())
        for s in (of.queries, of.keys)
    ]
    back = of.at[:, None] - of.of
    near = back < (of.window or 10**6)
    return (numbers[0][:, None] == numbers[1]) & (back >= 0) & near


RUNS = {
    "own": runs([5, 5, 1, 9], [5, 5, 1, 9], causal=True),
    "own, of one token": runs([1, 1, 1], [1, 1, 1], causal=True),
    "own, in a window": runs([5, 5, 1, 9], [5, 5, 1, 9], causal=True, window=3),
    "above": runs([7, 1, 3, 3], [2, 6, 1, 1]),
    "above, one query each": runs([1, 1], [2, 6]),
    "above, in a window": runs([3, 3, 2], [6, 6, 4], window=6, gap=1),
}


@pytest.mark.parametrize("kernel", [Fused(), Blocks(), Flash()], ids=["fused", "blocks", "flash"])
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("table", [2**26, 500], ids=["one block", "several"])
def test_a_kernel_is_softmax_attention_and_its_gradient(kernel, case, table, monkeypatch, flash):
    monkeypatch.setattr("scsdpo.policy.partial_attention.TABLE_BYTES", table)
    of = RUNS[case]
    if of.window and (isinstance(kernel, Fused) or not (of.causal or isinstance(kernel, Blocks))):
        return  # `kernel` does not choose it
    inputs = [
        x.requires_grad_() for x in states(*(torch.tensor(s).diff() for s in (of.queries, of.keys)))
    ]
    expected, normalizer = plain(*inputs, sight(of))
    detached = tuple(x.detach() for x in inputs)
    out, lse = kernel.forward(*detached, of)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, normalizer)
    grad = torch.randn_like(expected)
    for found, wanted in zip(
        kernel.backward(grad, detached, (out, lse), of),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", [Fused(), Blocks(), Flash()], ids=["fused", "blocks", "flash"])
def test_a_kernels_backward_takes_the_output_and_lse_of_a_union(kernel, flash):
    """Two sets of keys, one after the other, against one table with both."""
    lengths = [4, 2], [3, 5]
    own, above = runs([4, 2], [4, 2], causal=True), runs(*lengths)
    query, *mine = states(lengths[0], lengths[0])
    others = states(*lengths)[1:]
    inputs = [x.requires_grad_() for x in (query, *mine, *others)]
    joined = [torch.cat([a, b]) for a, b in zip(inputs[1:3], inputs[3:], strict=True)]
    expected, lse = plain(query, *joined, torch.cat([sight(own), sight(above)], 1))
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    query, *rest = (x.detach() for x in inputs)
    results = expected.detach(), lse.detach()
    first = kernel.backward(grad, (query, *rest[:2]), results, own)
    second = kernel.backward(grad, (query, *rest[2:]), results, above)
    torch.testing.assert_close(first[0] + second[0], wanted[0])
    for found, right in zip((*first[1:], *second[1:]), wanted[1:], strict=True):
        torch.testing.assert_close(found, right)


def test_a_query_that_sees_no_key_has_no_weight():
    of = runs([2], [9], window=2, gap=1)
    out, lse = Blocks().forward(*states([2], [9]), of)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("window", [None, 12], ids=["full", "window"])
def test_a_sink_is_one_more_key_and_narrow_values_are_those_of_wide_ones(window):
    """Of a tree of three segments, in float64, against the whole table of scores of each path."""
    root = tree.Segment(draw(torch.Generator(), 20))
    below = [tree.Segment(draw(torch.Generator(), n), (root,)) for n in (7, 9)]
    layout = PackedSegments([root, *below], {}, torch.device("cpu"), keep=False)
    torch.manual_seed(0)
    query, key, value, sinks = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 4, 36, 8), (1, 2, 36, 8), (1, 2, 36, 5), (4,))
    )
    inputs = query, key, value, sinks
    found = layout.attend(0, *inputs[:3], window=window, sinks=sinks)[0]
    wanted = torch.empty_like(found)
    for segment in (root, *below):
        places = [p for each in segment.line for p in range(36)[layout.span(each)]]
        n = len(places)
        scores = query[0][:, places] @ key[0].repeat_interleave(2, 0)[:, places].mT
        seen = torch.ones(n, n).tril().bool()
        if window:
            seen &= torch.ones(n, n).triu(1 - window).bool()
        scores = scores.masked_fill(~seen, -torch.inf)
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1)
        mixed = scores.softmax(-1)[..., :-1] @ value[0].repeat_interleave(2, 0)[:, places]
        wanted[layout.span(segment)] = mixed.transpose(0, 1)[-len(segment.ids) :]
    torch.testing.assert_close(found, wanted)
    told = torch.randn_like(found)
    grads = [torch.autograd.grad(x, inputs, told, retain_graph=True) for x in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
