"""HFRollout: what it says of its draws is what a plain forward of the model says."""

from dataclasses import replace

import pytest
import torch

from precision import allowed
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout import HFRollout
from scsdpo.types import Prompt, Sampling

FEW_ROWS = HFRollout(max_rows=8)
"""Two groups of four at first: responses leave and others take their place."""
SAMPLING = Sampling(n=4, max_new_tokens=24, temperature=0.7, seed=3)


def load(path, **kwargs):
    policy = CausalLM(str(path), **kwargs)
    policy.configure_model()
    return policy


@pytest.fixture
def prompts(policy):
    """Five prompts of 20 to 59 tokens, longer than OLMo's window."""
    texts = ["Why?", "Is water wet?", "Say it in Greek, please.", "One, two, ...", "A" * 40]
    return [prompt(policy, text) for text in texts]


def prompt(policy, text, key=None):
    ids = policy.chat.render(({"role": "user", "content": text},))
    return Prompt(key=key or text, messages=(), verifier=None, answer="", ids=ids)


def logits(policy, rollouts, q, i):
    """[n, V] of the plain model on one unpadded sequence, divided by the temperature."""
    start = rollouts.prompts[q].ids
    response = rollouts.ids[q, i][rollouts.sampled[q, i]].tolist()
    with policy.sampling_mode() as model:
        everything = model(torch.tensor([[*start, *response]]), use_cache=False).logits[0]
    return everything[len(start) - 1 : -1] / rollouts.temperature, torch.tensor(response)


def plain_log_probs(policy, rollouts):
    """[N] in the order of `rollouts.sampled`."""
    rows = []
    for q in range(len(rollouts.prompts)):
        for i in range(rollouts.ids.shape[1]):
            z, response = logits(policy, rollouts, q, i)
            rows.append(z.log_softmax(-1).gather(-1, response[:, None])[:, 0])
    return torch.cat(rows)


def lora_policy(path):
    policy = load(path, adapter=Lora(r=4, lora_dropout=0.5))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zeros at the start would hide an adapter left out
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return policy


def eager_experts(path):
    policy = load(path)
    policy.language_model.set_experts_implementation("eager")  # grouped ones know no float64
    return policy


@pytest.mark.parametrize(
    ("folder", "make"),
    [
        pytest.param("qwen3", load, id="tied"),
        pytest.param("qwen3_untied", load, id="untied"),
        pytest.param("olmo3", load, id="sliding window"),
        pytest.param("qwen3", lora_policy, id="lora"),
        pytest.param("olmo3", lambda p: load(p, gradient_checkpointing=True), id="checkpointing"),
        pytest.param("qwen3", lambda p: load(p, attn_implementation="eager"), id="eager"),
        pytest.param("qwen3_5", load, id="linear attention"),
        pytest.param("qwen3_5", lora_policy, id="linear attention, lora"),
        pytest.param("qwen3_next", eager_experts, id="linear attention, experts"),
        pytest.param("lfm2", load, id="convolution"),
    ],
)
def test_log_probs_are_those_of_a_plain_forward(folder, make, prompts, request):
    policy = make(request.getfixturevalue(folder))
    attention = policy.language_model.config._attn_implementation
    rollouts = FEW_ROWS.sample(policy, prompts, SAMPLING)
    assert policy.language_model.training
    assert policy.language_model.config._attn_implementation == attention
    assert rollouts.policy_logprobs.dtype == torch.float32
    expected = plain_log_probs(policy, rollouts)
    assert len(expected) > 100
    error = rollouts.policy_logprobs[rollouts.sampled] - expected
    assert error.abs().max() < allowed(policy, rollouts)
    assert torch.equal(rollouts.sampling_logprobs, rollouts.policy_logprobs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_sample_too(dtype, prompts, olmo3):
    policy = load(olmo3)
    policy.to(dtype)
    rollouts = FEW_ROWS.sample(policy, prompts, SAMPLING)
    error = rollouts.policy_logprobs[rollouts.sampled] - plain_log_probs(policy, rollouts)
    # RMSNorm and rotary positions are float32 even in a float64 model.
    assert error.abs().mean() < {torch.float64: 1e-6, torch.bfloat16: 0.1}[dtype]


def test_autocast_samples_too(policy, prompts):
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = FEW_ROWS.sample(policy, prompts, SAMPLING)
    error = rollouts.policy_logprobs[rollouts.sampled] - plain_log_probs(policy, rollouts)
    assert error.abs().mean() < 0.1


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}])
def test_sampling_log_probs_are_renormalised_over_what_was_kept(cut, policy, prompts):
    sampling = replace(SAMPLING, **cut)
    rollouts = FEW_ROWS.sample(policy, prompts[:2], sampling)
    assert (rollouts.sampling_logprobs > rollouts.policy_logprobs)[rollouts.sampled].all()
    limit = allowed(policy, rollouts)
    for q in range(2):
        z, response = logits(policy, rollouts, q, 1)
        for t, token in enumerate(response.tolist()):
            probs, ids = z[t].double().softmax(-1).sort(descending=True)
            kept = probs[: sampling.top_k or None]
            kept = kept / kept.sum()
            enough = int((kept.cumsum(0) < sampling.top_p).sum()) + 1
            place = ids.tolist().index(token)
            assert place < enough
            expected = (kept[place] / kept[:enough].sum()).log()
            assert abs(rollouts.sampling_logprobs[q, 1, t] - expected) < limit
            assert abs(rollouts.policy_logprobs[q, 1, t] - probs[place].log()) < limit


def test_first_tokens_follow_the_models_distribution(policy, prompts):
    sampling = Sampling(n=2000, max_new_tokens=1, temperature=1.5, top_k=6)
    rollouts = HFRollout().sample(policy, prompts[:1], sampling)
    z, _ = logits(policy, rollouts, 0, 0)
    kept, ids = z[0].topk(6)
    expected = 2000 * kept.softmax(-1)
    counts = (rollouts.ids.flatten()[:, None] == ids).sum(0)
    assert counts.sum() == 2000
    # Chi-square with 5 degrees of freedom exceeds 20.5 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_a_seed_gives_the_same_response_whatever_else_is_in_the_batch(policy, prompts):
    everything = HFRollout().sample(policy, prompts, SAMPLING)
    state = torch.get_rng_state()
    backwards = FEW_ROWS.sample(policy, prompts[::-1], SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)
    alone = HFRollout(max_tokens=1).sample(policy, prompts[2:3], replace(SAMPLING, n=6))
    assert backwards.texts[::-1] == everything.texts
    assert alone.texts[0][:4] == everything.texts[2]
    assert alone.texts[0][4] not in everything.texts[2]
    later = HFRollout().sample(policy, prompts, SAMPLING.at(1))
    assert not set(later.texts[0]) & set(everything.texts[0])


def test_copies_of_a_question_are_drawn_as_if_it_had_more_responses(policy, prompts):
    more = HFRollout().sample(policy, prompts[:1], replace(SAMPLING, n=2 * SAMPLING.n))
    copies = [prompts[0], replace(prompts[0], copy=1)]
    twice = FEW_ROWS.sample(policy, copies, SAMPLING)
    assert twice.texts[0] + twice.texts[1] == more.texts[0]
    assert not set(twice.texts[0]) & set(twice.texts[1])


def test_equal_prompts_run_once_and_are_drawn_by_their_own_keys(policy, prompts):
    twin = replace(prompts[0], key="twin")
    passes = []
    embedding = policy.language_model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape))
    rollouts = HFRollout(max_rows=16).sample(policy, [*prompts, twin, prompts[0]], SAMPLING)
    hook.remove()
    assert sum(rows for rows, tokens in passes if tokens > 1) == len(prompts)
    # Six prompts of four responses and one of eight more: part of a group may wait.
    assert max(rows for rows, tokens in passes if tokens == 1) == 16
    assert rollouts.texts[0] == rollouts.texts[-1]
    assert not set(rollouts.texts[0]) & set(rollouts.texts[-2])
    error = rollouts.policy_logprobs[rollouts.sampled] - plain_log_probs(policy, rollouts)
    assert error.abs().max() < allowed(policy, rollouts)


@pytest.mark.parametrize(
    ("rollout", "most"),
    [
        (HFRollout(), 20),
        (HFRollout(max_rows=9), 9),
        (HFRollout(max_rows=1), 1),
        # The longest prompt and four responses to it: 59 + 4 * 24 tokens.
        (HFRollout(max_tokens=3 * (59 + 96)), 12),
        (HFRollout(max_tokens=1), 1),
    ],
)
def test_budgets_bound_what_is_in_flight(rollout, most, policy, prompts):
    assert max(len(p.ids) for p in prompts) == 59
    passes = []
    embedding = policy.language_model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape))
    rollouts = rollout.sample(policy, prompts, SAMPLING)
    assert max(rows for rows, tokens in passes if tokens == 1) == most
    assert (rollouts.lengths > 0).all()


def test_any_end_id_ends_a_response_and_belongs_to_it(policy, prompts):
    plain = HFRollout().sample(policy, prompts, SAMPLING)
    # Two ids that the same draws contain become ends.
    ends = (int(plain.ids[0, 0, 5]), int(plain.ids[1, 2, 9]))
    policy.chat = replace(policy.chat, eos_ids=ends)
    rollouts = FEW_ROWS.sample(policy, prompts, SAMPLING)
    assert rollouts.ids.shape[-1] == int(rollouts.lengths.max())
    hit = set()
    for q in range(len(prompts)):
        for i in range(SAMPLING.n):
            n = int(rollouts.lengths[q, i])
            row = rollouts.ids[q, i].tolist()
            assert rollouts.sampled[q, i].tolist() == [t < n for t in range(len(row))]
            assert not set(row[: n - 1]) & set(ends)
            assert bool(rollouts.ended[q, i]) == (row[n - 1] in ends)
            assert rollouts.ended[q, i] or n == SAMPLING.max_new_tokens
            assert set(row[n:]) <= {policy.chat.pad_id}
            hit.add(row[n - 1])
    assert set(ends) <= hit
    assert not rollouts.policy_logprobs[~rollouts.sampled].any()


def test_padding_may_be_an_end_id(policy, prompts):
    plain = HFRollout().sample(policy, prompts, SAMPLING)
    end = int(plain.ids[0, 0, 5])
    policy.chat.tokenizer.pad_token = None  # then the first end id pads
    policy.chat = replace(policy.chat, eos_ids=(end,))
    assert policy.chat.pad_id == end
    rollouts = HFRollout().sample(policy, prompts, SAMPLING)
    assert rollouts.ended.any() and not rollouts.ended.all()
    last = rollouts.ids.gather(-1, rollouts.lengths[..., None] - 1)[..., 0]
    assert torch.equal(last == end, rollouts.ended)
    # Within the mask an end comes once; outside it there is nothing else.
    assert ((rollouts.ids == end) & rollouts.sampled).sum() == rollouts.ended.sum()
    assert (rollouts.ids == end)[~rollouts.sampled].all()


@pytest.mark.parametrize("cap", [1, 2, 7])
def test_the_length_cap_does_not_finish_a_response(cap, policy, prompts):
    policy.chat = replace(policy.chat, eos_ids=(10_000,))
    rollouts = FEW_ROWS.sample(policy, prompts, replace(SAMPLING, max_new_tokens=cap))
    assert rollouts.ids.shape == (5, 4, cap)
    assert rollouts.sampled.all() and not rollouts.ended.any()


def test_ids_beyond_the_tokenizer_give_no_text(policy, prompts):
    rollouts = HFRollout().sample(policy, prompts, replace(SAMPLING, n=16, temperature=2.0))
    size = len(policy.chat.tokenizer)
    assert (rollouts.ids >= size).any()
    for q, i in (rollouts.ids >= size).any(-1).nonzero().tolist():
        ids = rollouts.ids[q, i][rollouts.sampled[q, i]]
        assert rollouts.texts[q][i] == policy.chat.decode(ids[ids < size])


def test_stop_strings_end_a_response_at_the_token_that_completes_one(policy, prompts):
    policy.chat = replace(policy.chat, eos_ids=(10_000,))
    plain = HFRollout().sample(policy, prompts, SAMPLING)
    of_batch, of_prompt = plain.texts[0][0][4:6], plain.texts[1][2][7:10]
    assert of_batch.strip() and of_prompt.strip()
    stopping = [replace(p, stop=(of_prompt,) if q == 1 else ()) for q, p in enumerate(prompts)]
    rollouts = FEW_ROWS.sample(policy, stopping, replace(SAMPLING, stop=(of_batch,)))
    hits = set()
    for q in range(len(prompts)):
        stops = (of_batch, of_prompt) if q == 1 else (of_batch,)
        for i in range(SAMPLING.n):
            n = int(rollouts.lengths[q, i])
            ids = rollouts.ids[q, i, :n]
            assert torch.equal(ids, plain.ids[q, i, :n])
            found = [stop for stop in stops if stop in policy.chat.decode(ids)]
            assert not any(stop in policy.chat.decode(ids[:-1]) for stop in stops)
            assert bool(rollouts.ended[q, i]) == bool(found)
            assert found or n == SAMPLING.max_new_tokens
            assert rollouts.texts[q][i] == policy.chat.decode(ids)
            hits.update(found)
    assert hits == {of_batch, of_prompt}


def test_an_end_of_sequence_before_a_stop_string_wins(policy, prompts):
    policy.chat = replace(policy.chat, eos_ids=(10_000,))
    plain = HFRollout().sample(policy, prompts[:1], SAMPLING)
    text = plain.texts[0][0]
    end = int(plain.ids[0, 0, 3])
    policy.chat = replace(policy.chat, eos_ids=(end,))
    rollouts = HFRollout().sample(policy, prompts[:1], replace(SAMPLING, stop=(text[4:7],)))
    first = plain.ids[0, 0].tolist().index(end)
    assert rollouts.lengths[0, 0] == first + 1 and rollouts.ended[0, 0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"min_p": 1.5}, r"Sampling\(min_p=...\)` must be in \[0, 1\]"), ({"stop": ("",)}, "free of")],
)
def test_impossible_cuts_and_stops_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_rollouts_carry_the_weights_they_were_sampled_from(policy, prompts):
    before = HFRollout().sample(policy, prompts[:1], SAMPLING).version
    assert HFRollout().sample(policy, prompts[1:2], SAMPLING).version == before
    with torch.no_grad():
        next(policy.parameters())[0, 0] += 1e-3
    assert HFRollout().sample(policy, prompts[:1], SAMPLING).version != before


@pytest.mark.parametrize("name", ["max_tokens", "max_rows"])
def test_an_empty_budget_is_refused(name):
    with pytest.raises(ValueError, match=rf"`HFRollout\({name}=\.\.\.\)` must be >= 1, got 0"):
        HFRollout(**{name: 0})


def test_an_unrendered_prompt_is_refused(policy, prompts):
    with pytest.raises(ValueError, match="render it"):
        HFRollout().sample(policy, [replace(prompts[0], ids=())], SAMPLING)


def test_a_layer_that_bypasses_the_attention_is_refused(policy, prompts, monkeypatch):
    layer = policy.language_model.get_decoder().layers[1]
    monkeypatch.setattr(
        layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None)
    )
    with pytest.raises(ConfigurationError, match="1 of the 2 layers of Qwen3ForCausalLM"):
        HFRollout().sample(policy, prompts, SAMPLING)
