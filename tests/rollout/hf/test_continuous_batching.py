"""Continuous batching: what is drawn depends on no budget, and no budget is exceeded."""

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from precision import allowed
from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout import HFRollout
from scsdpo.rollout.hf import rollout as hf_rollout
from scsdpo.rollout.hf.kv_cache import KVCache, Size
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.rollout.hf.scheduler import Scheduler
from scsdpo.rollout.hf.shared_prefix import _cuts, _product
from scsdpo.types import Prompt, Sampling

SAMPLING = Sampling(n=4, max_new_tokens=150, temperature=0.7, seed=3)
END = 7


def load(path, **kwargs):
    policy = CausalLM(str(path), **kwargs)
    policy.configure_model()
    policy.chat = replace(policy.chat, eos_ids=(END,))
    return policy


def prompts_of(policy, *texts):
    rendered = [policy.chat.render(({"role": "user", "content": text},)) for text in texts]
    return [
        Prompt(key=text, messages=(), verifier=None, answer="", ids=ids)
        for text, ids in zip(texts, rendered, strict=True)
    ]


@pytest.fixture
def stragglers(monkeypatch):
    """Responses end where this says, whatever is drawn; one line a prompt, by key."""
    plain = ResponseBuffer.draw
    lengths = torch.tensor([[5, 9, 150, 3], [12, 70, 2, 149], [66, 8, 4, 30], [1, 140, 65, 64]])

    def draw(self, logits, rows, places):
        ids = plain(self, logits, rows, places)
        keys = [prompt.key for prompt in self.prompts]
        ends = torch.cat([lengths[sorted(keys).index(key)] for key in keys])[rows]
        ids = torch.where(ids == END, END + 1, ids)
        ids = torch.where(ends == places + 1, END, ids)
        self.ids[rows, places] = ids
        return ids

    monkeypatch.setattr(ResponseBuffer, "draw", draw)
    return lengths


@pytest.fixture
def held(monkeypatch):
    """Places held after each change of the cache."""
    sizes = []
    plain = KVCache.fit

    def fit(self, *args):
        plain(self, *args)
        sizes.append(self.tokens)

    monkeypatch.setattr(KVCache, "fit", fit)
    return sizes


def plain_log_probs(policy, rollouts):
    """[N] of one unpadded sequence after the other."""
    found = []
    for q, prompt in enumerate(rollouts.prompts):
        for i in range(rollouts.ids.shape[1]):
            response = rollouts.ids[q, i][rollouts.sampled[q, i]]
            ids = torch.cat([torch.tensor(prompt.ids), response])[None]
            with policy.sampling_mode() as model:
                z = model(ids, use_cache=False).logits[0, len(prompt.ids) - 1 : -1]
            log_probs = (z / rollouts.temperature).log_softmax(-1)
            found.append(log_probs.gather(-1, response[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("folder", "optimist"),
    [
        pytest.param("qwen3", False, id="as expected"),
        pytest.param("qwen3", True, id="short of memory"),
        pytest.param("olmo3", False, id="as expected, window"),
        pytest.param("olmo3", True, id="short of memory, window"),
        pytest.param("qwen3_5", True, id="short of memory, linear attention"),
    ],
)
def test_no_budget_changes_a_response(folder, optimist, request, stragglers, held, monkeypatch):
    """OLMo's window of 8 tokens is a ring that both prompts and responses outgrow."""
    policy = load(request.getfixturevalue(folder))
    prompts = prompts_of(policy, "A" * 40, "Is water wet?", "One, two, ...", "Why?")
    everything = HFRollout().sample(policy, prompts, SAMPLING)
    assert torch.equal(everything.lengths, stragglers)
    error = everything.policy_logprobs[everything.sampled] - plain_log_probs(policy, everything)
    ids = everything.ids[everything.sampled]
    drawn = (ids != END) & (ids != END + 1)  # the others were put there
    assert drawn.sum() > 600
    limit = allowed(policy, everything)
    assert error[drawn].abs().max() < limit
    given_up = []
    if optimist:
        monkeypatch.setattr(Scheduler, "_mean", lambda *_: 1.0)
        put_back = Scheduler.put_back
        monkeypatch.setattr(
            Scheduler, "put_back", lambda self, r: (given_up.append(r), put_back(self, r))
        )
    for rollout in (HFRollout(max_tokens=500), HFRollout(max_tokens=900), HFRollout(max_rows=3)):
        held.clear()
        other = rollout.sample(policy, prompts[::-1], SAMPLING)
        assert max(held) <= rollout.max_tokens
        assert other.texts[::-1] == everything.texts
        for name in ("policy_logprobs", "sampling_logprobs"):
            error = getattr(other, name).flip(0) - getattr(everything, name)
            assert error.abs().max() < 2 * limit
    assert bool(given_up) == optimist


def test_a_response_drawn_again_is_searched_again_for_stop_strings(qwen3, stragglers, monkeypatch):
    policy = load(qwen3)
    prompts = prompts_of(policy, "A" * 40, "Is water wet?", "One, two, ...", "Why?")
    text = HFRollout().sample(policy, prompts, SAMPLING).texts[0][2]
    sampling = replace(SAMPLING, stop=(text[100:102],))
    everything = HFRollout().sample(policy, prompts, sampling)
    monkeypatch.setattr(Scheduler, "_mean", lambda *_: 1.0)
    assert HFRollout(max_tokens=500).sample(policy, prompts, sampling).texts == everything.texts


def test_a_slot_is_refilled_when_a_response_ends(qwen3, stragglers):
    policy = load(qwen3)
    prompts = prompts_of(policy, "a", "b", "c", "d")
    rows = []
    embedding = policy.language_model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    HFRollout(max_rows=4).sample(policy, prompts, SAMPLING)
    hook.remove()
    decoded = [count for count, tokens in rows if tokens == 1]
    assert max(decoded) == 4
    # Four groups one after the other would take the longest of each.
    assert len(decoded) < 0.6 * int(stragglers.max(-1).values.sum())
    assert sum(count for count, tokens in rows if tokens > 1) == 4


def test_memory_follows_actual_lengths(qwen3, stragglers, held):
    policy = load(qwen3)
    prompts = prompts_of(policy, "a", "b", "c", "d")
    HFRollout().sample(policy, prompts, replace(SAMPLING, max_new_tokens=4000))
    in_prompts = sum(len(p.ids) for p in prompts)
    # Every response in the largest block that its length needs, and as much room to grow.
    assert max(held) < in_prompts + 2 * int(((stragglers / 64).ceil() * 64).sum())


def test_sliding_layers_keep_their_window_only(olmo3, stragglers, monkeypatch):
    caches = set()
    plain = KVCache.fit
    monkeypatch.setattr(KVCache, "fit", lambda self, *args: (caches.add(self), plain(self, *args)))
    widths = []
    resize = KVCache.layer

    def layer(self, *args):
        found = resize(self, *args)
        tables = [found.prompts, *found.buckets]
        widths.append((args[0], max(table.keys.shape[2] for table in tables)))
        return found

    monkeypatch.setattr(KVCache, "layer", layer)
    policy = load(olmo3)
    HFRollout().sample(policy, prompts_of(policy, "a", "b", "c", "A" * 40), SAMPLING)
    sliding, full = (max(w for i, w in widths if i == index) for index in (0, 1))
    assert sliding == 8 and full >= 149


def test_lora_samples_from_merged_weights_and_leaves_the_policy_as_it_was(qwen3, monkeypatch):
    policy = load(qwen3, adapter=Lora(r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    prompts = prompts_of(policy, "Why?", "Is water wet?")
    modules = dict(policy.named_modules())
    before = {name: p.clone() for name, p in policy.named_parameters()}
    steps = []
    embedding = policy.language_model.get_input_embeddings()
    embedding.register_forward_pre_hook(
        lambda *_: steps.append(any(isinstance(m, LoraLayer) for m in policy.modules()))
    )
    fast = HFRollout().sample(policy, prompts, SAMPLING)
    assert steps and not any(steps)
    assert {name: id(m) for name, m in policy.named_modules()} == {
        name: id(m) for name, m in modules.items()
    }
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    monkeypatch.setattr(hf_rollout, "free_bytes", lambda _: 0)
    steps.clear()
    adapted = HFRollout().sample(policy, prompts, SAMPLING)
    assert all(steps)
    assert torch.equal(fast.ids, adapted.ids) and fast.version == adapted.version
    assert (fast.policy_logprobs - adapted.policy_logprobs).abs().max() < allowed(policy, adapted)


def test_dora_layers_run_as_they_are(qwen3):
    policy = load(qwen3, adapter=Lora(r=4, use_dora=True))
    rollouts = HFRollout().sample(policy, prompts_of(policy, "Why?"), SAMPLING)
    error = rollouts.policy_logprobs[rollouts.sampled] - plain_log_probs(policy, rollouts)
    assert error.abs().max() < allowed(policy, rollouts)


def test_scores_of_narrow_numbers_are_float32():
    a, b = torch.randn(2, 3, 4, 64).bfloat16(), torch.randn(2, 3, 64, 5).bfloat16()
    product = _product(a, b)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_prompts_are_cut_where_padding_to_the_fullest_costs_most():
    # One strip: 40 prompts x 16 members x 100 tokens = 64,000 pairs; cut after the 36 prompts
    # of one member: 3,600 + 6,400.
    members, lengths = [1] * 36 + [16] * 4, [100] * 40
    assert _cuts(members, lengths, (0, 40), 2) == [(0, 36), (36, 40)]
    assert _cuts([16] * 40, lengths, (0, 40), 2) == [(0, 40)]
    # What it saves is less than a product of its own takes.
    assert _cuts([1, 2], [100, 100], (0, 2), 2) == [(0, 2)]


@pytest.mark.parametrize(
    ("old", "need", "expected"),
    [
        (Size(), Size(8, 64), Size(10, 64)),
        (Size(10, 64), Size(10, 64), Size(10, 64)),
        (Size(10, 64), Size(4, 64), Size(5, 64)),  # more than twice what it needs
        (Size(10, 64), Size(10, 128), Size(10, 192)),  # half as much again, in blocks
        (Size(10, 192), Size(10, 256), Size(10, 256)),  # the limit
        (Size(10, 64), Size(0, 64), Size()),
    ],
)
def test_rectangles_grow_by_a_share(old, need, expected):
    assert old.roomy(need, limit=256) == expected
