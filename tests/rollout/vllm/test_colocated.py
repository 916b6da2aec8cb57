"""In which order `Colocated` works its engine: a spy in vLLM's place, which needs neither."""

import pytest
import torch

from runs import data, module, trainer
from scsdpo import distributed
from scsdpo.distributed import RemoteError
from scsdpo.errors import ConfigurationError
from scsdpo.rollout import Colocated, VLLMRollout
from scsdpo.rollout.vllm.colocated import InProcess
from scsdpo.rollout.vllm.rollout import EngineAnswer
from scsdpo.rollout.weights.hashing import StreamHash
from scsdpo.rollout.weights.versions import Versions
from scsdpo.types import Prompt, Sampling

SAMPLING = Sampling(n=1, max_new_tokens=4)


class Spy:
    """Notes what is asked of vLLM's `LLM`, and with which label of its weights."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []
        self.dtypes = set()

    def note(self, *call):
        self.calls.append(call)

    def collective_rpc(self, method, args):
        stream = StreamHash()
        self.dtypes = {value.dtype for _, value in stream.over(args[0])}
        self.note(method, self.engine._version)
        return [{"hash": stream.hexdigest(), "missing": []}]

    def reset_prefix_cache(self):
        self.note("reset_prefix_cache")
        return True

    def update_weight_version(self, version):
        self.note("update_weight_version", version)

    def wake_up(self, tags):
        self.note("wake_up", tags)

    def sleep(self, level):
        self.note("sleep", level)

    def ask(self, requests):
        self.note("generate", self.engine._version)
        found = frozenset({self.engine._version})
        answer = EngineAnswer(ids=[5], logprobs=[-1.0], finish_reason="stop", versions=found)
        return [[answer] for _ in requests]


@pytest.fixture
def spy(monkeypatch):
    engine = Colocated(sleep=True, dtype="bfloat16")
    made = Spy(engine)
    engine._llm, engine._ask = made, made.ask
    engine._sink = InProcess(made)
    labels = iter(f"label {i}" for i in range(9))

    def label(versions, policy):
        made.note("label", engine._version)
        return next(labels)

    monkeypatch.setattr(Versions, "of", label)
    return made


def sample(policy, spy):
    ids = policy.chat.render(({"role": "user", "content": "Why?"},))
    asked = Prompt(key="0", messages=(), verifier=None, answer="", ids=ids)
    return VLLMRollout(spy.engine).sample(policy, [asked], SAMPLING)


def awake(number, *, woken):
    """From the label to the answer."""
    return [
        ("label", ""),
        *([("wake_up", ["weights"])] if woken else []),
        ("scsdpo_load", ""),
        *([("wake_up", ["kv_cache"])] if woken else []),
        ("reset_prefix_cache",),
        ("update_weight_version", f"label {number}"),
        ("generate", f"label {number}"),
    ]


def test_an_engine_sleeps_without_its_weights_and_wakes_in_two_parts(policy, spy):
    """Weights are woken for the load, keys and values behind it; both are dropped, not copied."""
    for _ in range(2):
        sample(policy, spy)
    first, second = awake(0, woken=False), awake(1, woken=True)
    assert spy.calls == [*first, ("sleep", 2), *second, ("sleep", 2)]


def test_an_engine_sleeps_once_while_it_is_held(policy, spy):
    rollout = VLLMRollout(spy.engine)
    ids = policy.chat.render(({"role": "user", "content": "Why?"},))
    asked = Prompt(key="0", messages=(), verifier=None, answer="", ids=ids)
    with rollout.hold_weights(policy, barrier=False):
        seen = [rollout.sample(policy, [asked], SAMPLING).version for _ in range(2)]
    assert seen == ["label 0", "label 0"]
    names = [name for name, *_ in spy.calls]
    assert names.count("scsdpo_load") == names.count("sleep") == 1
    assert names[-3:] == ["generate", "generate", "sleep"]


@pytest.mark.parametrize("broken", ["_ask", "collective_rpc", "wake_up"])
def test_an_engine_sleeps_whatever_fails_and_has_no_label_then(policy, spy, monkeypatch, broken):
    sample(policy, spy)

    def fail(*_, **__):
        raise RuntimeError("broken")

    with monkeypatch.context() as harmed:
        harmed.setattr(spy.engine if broken == "_ask" else spy, broken, fail)
        with pytest.raises(RuntimeError, match="broken"):
            sample(policy, spy)
    assert spy.calls[-1] == ("sleep", 2) and spy.engine._version == ""
    del spy.calls[:]
    assert sample(policy, spy).version == "label 2"
    assert spy.calls == [*awake(2, woken=True), ("sleep", 2)]


def test_a_rank_that_has_its_weights_asks_for_all_again_after_another_one_failed(
    policy, spy, monkeypatch
):
    """Or it would make other passes than the rank that failed, which waits in a gather."""
    failed = RemoteError.of(OSError("torn"))
    engine = spy.engine
    monkeypatch.setattr(
        engine._sink, "send", lambda *_: setattr(engine._sink, "_base", "has a base")
    )
    monkeypatch.setattr(distributed, "all_gather", lambda items: [*items, failed])
    with pytest.raises(RuntimeError, match="OSError: torn"):
        engine._synchronize(policy, "label")
    assert engine._sink._base == engine._version == ""


def test_weights_are_cast_to_the_engines_dtype(policy, spy):
    sample(policy, spy)
    assert spy.dtypes == {torch.bfloat16}


def test_what_does_not_fit_is_refused_before_the_engine_is_touched(policy, spy):
    spy.engine.max_model_len = 8
    with pytest.raises(ConfigurationError, match="vLLM has room for 8: raise model"):
        sample(policy, spy)
    assert spy.calls == []


def test_a_run_whose_longest_prompt_leaves_no_room_is_refused_before_weights_load(
    qwen3, tmp_path, monkeypatch
):
    monkeypatch.setattr(Colocated, "check_installed", lambda _: None)
    model = module(qwen3, rollout=VLLMRollout(Colocated(max_model_len=40)))
    message = (
        r"room for 40 tokens .* data\.max_prompt_tokens \(33\) and model\.sampling\.max_new_tokens "
        r"\(8\) are 41: raise"
    )
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path).fit(model, data(max_prompt_tokens=33))
    assert model.policy.model is None
