"""vLLM in the trainer's process: what it says it drew is what the trainer computes."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from policies import MAKERS, check_parity, gaps, move, prompt, short_and_long

from precision import allowed
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.metrics import GapCheck
from scsdpo.rollout import Colocated, VLLMRollout, WeightReceiver
from scsdpo.rollout.weights.stream import merged_weights
from scsdpo.rollout.weights.versions import Versions
from scsdpo.training.self_check import examine
from scsdpo.types import Sampling

SAMPLING = Sampling(n=4, max_new_tokens=24, seed=3)


class Case:
    """A policy with an engine of its own."""

    def __init__(self, policy):
        self.policy = policy
        self.engine = Colocated(
            max_model_len=512, kv_cache_gib=0.25, enforce_eager=True, adapter="merged"
        )
        self.rollout = VLLMRollout(self.engine)
        self.prompts = short_and_long(policy)

    def sample(self, sampling=SAMPLING, prompts=None):
        return self.rollout.sample(self.policy, prompts or self.prompts, sampling)


@pytest.fixture(scope="module", params=list(MAKERS))
def case(request, tmp_path_factory):
    made = Case(MAKERS[request.param](tmp_path_factory.mktemp(request.param)))
    yield made
    made.rollout.close()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampled_log_probs_are_the_trainers(case, temperature):
    rollouts = case.sample(replace(SAMPLING, temperature=temperature))
    assert int(rollouts.sampled.sum()) > 100
    check_parity(case.policy, rollouts)
    assert torch.equal(rollouts.sampling_logprobs, rollouts.policy_logprobs)


def test_the_self_check_asks_it_and_finds_old_weights(case, monkeypatch):
    def asked():
        return examine(case.policy, {}, case.rollout, 1.0, GapCheck(warn=0.01, stop=0.01))

    (*_, found), left_out = asked()
    assert (found.path, found.fault, left_out) == ("VLLMRollout", "", "")
    assert found.apart < 1e-3
    move(case.policy, 3)
    with monkeypatch.context() as stuck:
        stuck.setattr(case.engine, "_synchronize", lambda *_: None)
        stuck.setattr(Versions, "of", lambda *_: case.engine._version)
        with pytest.raises(ConfigurationError, match=r"VLLMRollout and the trainer differ by"):
            asked()
    assert not asked()[0][-1].fault


def test_prompt_log_probs_are_the_trainers(case):
    from vllm import SamplingParams

    sampled = case.sample()
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for asked in case.prompts:
        (output,) = case.engine._llm.generate(
            [{"prompt_token_ids": list(asked.ids)}], parameters, use_tqdm=False
        )
        said = [
            at[i].logprob for i, at in zip(asked.ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        with case.policy.sampling_mode() as model:
            z = model(torch.tensor([asked.ids])).logits[0, :-1].log_softmax(-1)
        expected = z.gather(-1, torch.tensor(asked.ids[1:])[:, None])[:, 0]
        assert (torch.tensor(said) - expected).abs().max() < allowed(case.policy, sampled)


def test_an_unsynchronised_engine_is_wrong_and_synchronising_mends_it(case, monkeypatch):
    """Over several steps; the long prompt would be read from the old weights' prefix cache."""
    case.sample()
    for step in range(3):
        move(case.policy, step)
        with monkeypatch.context() as stuck:
            stuck.setattr(case.engine, "_synchronize", lambda *_: None)
            stuck.setattr(Versions, "of", lambda *_: case.engine._version)
            stale = gaps(case.policy, case.sample())
        assert all(gap.mean() > 0.01 for gap in stale)
        rollouts = case.sample()
        check_parity(case.policy, rollouts)


def test_without_resetting_the_prefix_cache_long_prompts_are_wrong(case, monkeypatch):
    """The trap itself: if this passes no more, the reset is no longer needed."""
    case.sample()
    move(case.policy, 7)
    monkeypatch.setattr(case.engine._llm, "reset_prefix_cache", lambda: True)
    rollouts = case.sample()
    *short, long = gaps(case.policy, rollouts)
    assert max(gap.max() for gap in short) < allowed(case.policy, rollouts)
    assert long.mean() > 0.01
    monkeypatch.undo()
    move(case.policy, 8)
    check_parity(case.policy, case.sample())


def test_a_tied_head_is_stale_unless_it_is_packed_again(case, request, monkeypatch):
    """The trap itself: if this passes no more, `_repack_heads` is no longer needed."""
    case.sample()
    with monkeypatch.context() as plain:
        plain.setattr("scsdpo.rollout.weights.receiver._repack_heads", lambda _: None)
        move(case.policy, 11)
        rollouts = case.sample()
        gap = torch.cat(gaps(case.policy, rollouts))
        limit = allowed(case.policy, rollouts)
    tied = request.node.callspec.params["case"] == "tied"  # LoRA leaves the embedding as it is
    assert gap.mean() > 0.01 if tied else gap.max() < limit
    move(case.policy, 12)
    check_parity(case.policy, case.sample())


def on_the_way(harm):
    """`scsdpo_load` with a stream that is harmed before it arrives."""
    load = WeightReceiver.scsdpo_load
    return lambda worker, weights: load(worker, harm(weights))


HARMS = {
    "times 1.5": (lambda ws: ((n, w * 1.5) for n, w in ws), "received other weights"),
    "half of them": (lambda ws: (p for i, p in enumerate(ws) if i % 2), "received other weights"),
}
UNSENT = {
    "every second": lambda i, name: i % 2 == 0,
    "a part of q, k and v in one": lambda i, name: "layers.1.self_attn.k_proj" not in name,
    "the embedding": lambda i, name: "embed_tokens" not in name,
    "the last norm": lambda i, name: name != "model.norm.weight",
}


def refused_and_mended(case, message):
    with pytest.raises(TrainingStopped, match=message):
        case.sample()
    assert case.engine._version == ""


@pytest.mark.parametrize(("harm", "message"), HARMS.values(), ids=HARMS)
def test_weights_that_are_changed_on_the_way_are_refused(case, monkeypatch, harm, message):
    case.sample()
    move(case.policy, 20)
    with monkeypatch.context() as harmed:
        harmed.setattr(WeightReceiver, "scsdpo_load", on_the_way(harm))
        refused_and_mended(case, message)
    check_parity(case.policy, case.sample())


@pytest.mark.parametrize("sent", UNSENT.values(), ids=UNSENT)
def test_an_engine_that_did_not_get_every_parameter_is_refused(case, monkeypatch, sent):
    def some(policy, dtype):
        return (pair for i, pair in enumerate(merged_weights(policy, dtype)) if sent(i, pair[0]))

    case.sample()
    move(case.policy, 21)
    with monkeypatch.context() as lacking:
        lacking.setattr("scsdpo.rollout.weights.stream.merged_weights", some)
        refused_and_mended(case, "got incomplete weights for [0-9]+ of its modules")
    check_parity(case.policy, case.sample())


def test_a_stream_that_breaks_off_leaves_nothing_behind(case, monkeypatch):
    def torn(policy, dtype):
        for name, value in merged_weights(policy, dtype):
            if "layers.1.self_attn.k_proj" in name:
                raise OSError("torn")
            yield name, value

    case.sample()
    move(case.policy, 22)
    with monkeypatch.context() as broken:
        broken.setattr("scsdpo.rollout.weights.stream.merged_weights", torn)
        with pytest.raises(OSError, match="torn"):
            case.sample()
    check_parity(case.policy, case.sample())


def test_autocast_of_the_trainer_does_not_reach_the_engine(case):
    plain = case.sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.sample().sampling_logprobs, plain.sampling_logprobs)


def test_equal_weights_are_not_brought_again(case, monkeypatch):
    version = case.sample().version

    def refuse(*_, **__):
        raise AssertionError("weights were brought although they did not change")

    monkeypatch.setattr(case.engine._llm, "collective_rpc", refuse)
    assert case.sample().version == version


def test_a_seed_gives_the_same_response_whatever_else_is_in_the_batch(case):
    together = case.sample()
    assert case.sample(prompts=case.prompts[::-1]).texts[::-1] == together.texts
    alone = case.sample(replace(SAMPLING, n=6), case.prompts[1:2])
    assert alone.texts[0][:4] == together.texts[1]
    assert len(set(alone.texts[0])) > 1
    later = case.sample(SAMPLING.at(1))
    assert not set(later.texts[0]) & set(together.texts[0])


def test_sampling_leaves_the_process_as_it_was(case):
    case.sample()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    case.sample(SAMPLING.at(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_cut_log_probs_are_renormalised_and_the_policys_unknown(case, cut):
    sampling = replace(SAMPLING, **cut)
    rollouts = case.sample(sampling)
    assert rollouts.policy_logprobs[rollouts.sampled].isnan().all()
    assert not rollouts.policy_logprobs[~rollouts.sampled].any()
    start, ids = case.prompts[1].ids, rollouts.ids[1, 0][rollouts.sampled[1, 0]]
    with case.policy.sampling_mode() as model:
        z = model(torch.tensor([[*start, *ids.tolist()]])).logits[0, len(start) - 1 : -1]
    limit = allowed(case.policy, rollouts)
    for t, token in enumerate(ids.tolist()):
        probs, order = z[t].double().softmax(-1).sort(descending=True)
        kept = {
            "top_k": torch.arange(len(probs)) < 5,
            "top_p": probs.cumsum(0) - probs < 0.8,
            "min_p": probs >= 0.1 * probs[0],
        }[next(iter(cut))]
        place = order.tolist().index(token)
        assert kept[place]
        expected = (probs[place] / probs[kept].sum()).log()
        assert abs(rollouts.sampling_logprobs[1, 0, t] - expected) < limit


def test_any_end_id_and_any_stop_string_ends_a_response(case):
    chat = case.policy.chat
    try:
        case.policy.chat = replace(chat, eos_ids=(10_000,))
        plain = case.sample()
        assert not plain.ended.any() and plain.sampled.all()
        end, stop = int(plain.ids[0, 0, 5]), plain.texts[1][1][5:7]
        ending = case.policy.chat = replace(chat, eos_ids=(end,))
        prompts = [case.prompts[0], replace(case.prompts[1], stop=(stop,)), case.prompts[2]]
        rollouts = case.sample(prompts=prompts)
    finally:
        case.policy.chat = chat
    seen = set()
    for q in range(len(prompts)):
        for i in range(SAMPLING.n):
            n = int(rollouts.lengths[q, i])
            ids = rollouts.ids[q, i, :n].tolist()
            assert ids == plain.ids[q, i, :n].tolist()
            assert end not in ids[:-1]
            by_string = q == 1 and stop in rollouts.texts[q][i]
            assert bool(rollouts.ended[q, i]) == (ids[-1] == end or by_string)
            assert rollouts.ended[q, i] or n == SAMPLING.max_new_tokens
            assert rollouts.texts[q][i] == ending.decode(ids)  # an end has no text
            seen.add("string" if by_string else "id" if ids[-1] == end else "cap")
    assert {"string", "id"} <= seen


def test_what_does_not_fit_is_refused(case):
    with pytest.raises(ConfigurationError, match=r"may take 599 tokens.* 512: raise model"):
        case.sample(replace(SAMPLING, max_new_tokens=300), [prompt(case.policy, "A" * 280)])


def test_closing_undoes_torch_distributed_and_sampling_may_go_on(case):
    case.sample()
    threads = torch.get_num_threads()
    case.rollout.close()
    assert not dist.is_initialized()
    torch.set_num_threads(threads + 1)  # vLLM replaces this function by one that does nothing
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    check_parity(case.policy, case.sample())


def test_settings_that_vllm_cannot_start_with_are_one_line_and_others_start_after(case):
    case.rollout.close()
    wanted, case.engine.kv_cache_gib = case.engine.kv_cache_gib, 1e-4
    with pytest.raises(ConfigurationError, match=r"these kv_cache_gib, max_model_len") as told:
        case.sample()
    assert "\n" not in str(told.value) and not dist.is_initialized()
    case.engine.kv_cache_gib = wanted
    check_parity(case.policy, case.sample())
