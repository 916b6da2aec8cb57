"""Servers without vLLM: what is refused, what is said, and who does what another fails at."""

import contextlib
import json
import threading
import time

import pytest
import torch.distributed as dist

from canned_vllm import GENERATE, GOOD, LABEL, answering, error, follow, ready, serving
from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout import Delivery, Download, Servers, VLLMRollout
from scsdpo.rollout.servers.server import NotNow
from scsdpo.rollout.weights.versions import Versions
from scsdpo.types import Prompt, Sampling


@pytest.fixture(autouse=True)
def labelled(monkeypatch):
    """The policy's weights have a label that canned servers can know."""
    monkeypatch.setattr(Versions, "of", lambda self, policy: LABEL)


@pytest.fixture
def canned(monkeypatch):
    """A server, its `answers` to be filled in."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with serving() as server:
        yield server


@pytest.fixture
def other():
    with serving() as server:
        yield server


@pytest.fixture
def ranks():
    """This process is rank 1 of two."""
    dist.init_process_group("fake", rank=1, world_size=2, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sample(policy, engine, questions=1, close=True):
    ids = policy.chat.render(({"role": "user", "content": "Why?"},))
    asked = [
        Prompt(key=str(q), messages=(), verifier=None, answer="", ids=ids) for q in range(questions)
    ]
    rollout = VLLMRollout(engine)
    try:
        return rollout.sample(policy, asked, Sampling(n=2, max_new_tokens=4))
    finally:
        if close:
            rollout.close()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "was started without VLLM_SERVER_DEV_MODE=1: start it with"),
        (
            {
                "/collective_rpc": error(
                    500,
                    "Call to collective_rpc method failed: Worker failed with error ''CPUWorker' "
                    "object has no attribute 'scsdpo_describe''",
                )
            },
            "was started without --worker-extension-cls scsdpo.rollout.WeightReceiver",
        ),
        (
            {"/collective_rpc": (200, {"results": [GOOD | {"logprobs_mode": "raw_logprobs"}]})},
            "start it with --logprobs-mode processed_logprobs",
        ),
        (
            {"/collective_rpc": (200, {"results": [GOOD | {"quantization": "fp8"}]})},
            r"quantises its weights \(fp8\)",
        ),
        (
            {"/collective_rpc": (401, {"error": "Unauthorized"})},
            "engine.key: .* needs a key, .* variable VLLM_API_KEY is not set: set it",
        ),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused_with_the_flag(
    policy, canned, answers, message
):
    canned.answers |= answers
    with pytest.raises(ConfigurationError, match=message) as refused:
        sample(policy, Servers([canned.url], Download(), patience=30))
    assert canned.url in str(refused.value)


def test_a_server_without_room_for_a_response_is_refused_with_the_flag(policy, canned):
    small = {"results": [GOOD | {"max_model_len": 10}]}
    canned.answers |= ready() | {"/collective_rpc": (200, small)}
    message = f"room for 10: start the server {canned.url} with a larger --max-model-len"
    with pytest.raises(ConfigurationError, match=message):
        sample(policy, Servers([canned.url], Download(), patience=30))


def test_a_server_without_scale_out_is_refused_with_the_flag(policy, canned):
    said = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to ..."
    canned.answers |= ready() | {GENERATE: error(403, said)}
    with pytest.raises(ConfigurationError, match="was started without --enable-scale-out"):
        sample(policy, Servers([canned.url], Download(), patience=30))


def test_servers_of_different_dtypes_are_refused(policy, canned, other):
    canned.answers |= ready()
    other.answers |= {"/collective_rpc": (200, {"results": [GOOD | {"dtype": "bfloat16"}]})}
    with pytest.raises(ConfigurationError, match=r"different dtypes \(bfloat16, float32\)"):
        sample(policy, Servers([canned.url, other.url], Download()))


def test_nobody_at_the_url_ends_the_run_with_its_name(policy):
    gone = "http://127.0.0.1:9"
    with pytest.raises(TrainingStopped, match=f"no vLLM server could be used for .* s .{gone}: "):
        sample(policy, Servers([gone], Download(), patience=0.2))


def test_a_server_that_is_not_well_is_asked_again(policy, canned):
    canned.answers |= ready() | {GENERATE: error(500, "EngineCore encountered an issue")}
    recovery = threading.Timer(0.7, canned.answers.update, [answering()])
    recovery.start()
    rollouts = sample(policy, Servers([canned.url], Download()))
    recovery.join()
    assert rollouts.ids.tolist() == [[[5], [5]]] and rollouts.ended.all()
    assert rollouts.sampling_logprobs.tolist() == [[[-1.0], [-1.0]]]
    assert rollouts.version == LABEL


@pytest.mark.parametrize("fault", ["dead", "ill", "hangs"])
def test_what_one_server_fails_at_another_does(policy, canned, other, monkeypatch, fault):
    """It is set aside after `patience`; the run does not wait for its `timeout`."""
    monkeypatch.setattr("scsdpo.rollout.servers.watched_server._LOOK", 0.1)
    monkeypatch.setattr("scsdpo.rollout.servers.server.SHORT", 0.5)
    canned.answers |= ready() | answering()
    canned.before[GENERATE] = lambda _: time.sleep(0.05)
    other.answers |= ready() | {GENERATE: error(500, "ill")}
    over = threading.Event()
    if fault == "hangs":
        for path in (GENERATE, "/weight_info"):
            # Once it has got a request.
            other.before[path] = lambda _: (
                any(p == GENERATE for p, _ in other.asked) and (over.wait(60))
            )
    url = "http://127.0.0.1:9" if fault == "dead" else other.url
    start = time.monotonic()
    try:
        rollouts = sample(
            policy, Servers([canned.url, url], Download(), patience=1.0), questions=12
        )
    finally:
        over.set()
    assert time.monotonic() - start < 50
    assert rollouts.ids.tolist() == [[[5], [5]]] * 12
    assert any(path == GENERATE for path, _ in other.asked) == (fault != "dead")


def test_a_server_that_loads_slowly_is_not_waited_for_and_gets_the_newest(
    policy, canned, other, monkeypatch
):
    monkeypatch.setattr("scsdpo.rollout.servers.server.refusal", lambda *_: "")
    over, loads = threading.Event(), []

    def load(handler):
        if json.loads(handler.body)["method"] == "scsdpo_fetch":
            loads.append(json.loads(handler.body)["kwargs"]["locations"])
            over.wait(60)

    follow(canned)
    follow(other)
    other.before["/collective_rpc"] = load
    engine = Servers([canned.url, other.url], Download())
    try:
        for version in ("first", "second", "third"):
            monkeypatch.setattr(Versions, "of", lambda *_, v=version: v)
            assert sample(policy, engine, questions=4, close=False).version == version
        assert len(loads) == 1 and "/first/" in loads[0][0]
        over.set()
        deadline = time.monotonic() + 60
        while other.answers["/weight_info"][1]["weight_version"] != "third":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        over.set()
        engine.close()
    assert len(loads) == 2 and "/third/" in loads[1][0]


def test_the_server_that_is_ready_first_leaves_a_share_to_the_other(
    policy, canned, other, monkeypatch
):
    monkeypatch.setattr("scsdpo.rollout.servers.server.refusal", lambda *_: "")
    over = threading.Event()
    canned.answers |= ready() | answering()
    canned.before[GENERATE] = lambda _: over.wait(60)
    follow(other)
    other.before["/collective_rpc"] = lambda _: time.sleep(0.3)
    other.before[GENERATE] = lambda _: over.set()
    sample(policy, Servers([canned.url, other.url], Download()), questions=4)
    assert any(path == GENERATE for path, _ in other.asked)


def test_each_server_takes_the_next_prompt_when_it_has_room(policy, canned, other):
    few = {"/collective_rpc": (200, {"results": [GOOD | {"max_num_seqs": 2}]})}
    for server, seconds in ((canned, 0.0), (other, 1.0)):
        server.answers |= ready() | answering() | few
        server.before[GENERATE] = lambda _, seconds=seconds: time.sleep(seconds)
    sample(policy, Servers([canned.url, other.url], Download()), questions=40)
    fast, slow = (sum(p == GENERATE for p, _ in server.asked) for server in (canned, other))
    assert fast + slow == 40 and fast > slow


def test_an_answer_that_trickles_has_a_deadline(policy, canned):
    """A byte now and then keeps a socket alive for ever."""

    def trickle(handler):
        with contextlib.suppress(OSError):
            for _ in range(3000):
                handler.wfile.write(b"x")
                time.sleep(0.02)

    canned.answers |= ready()
    canned.before[GENERATE] = trickle
    with pytest.raises(TrainingStopped, match=r"generate: no answer within 0\.3 s"):
        sample(policy, Servers([canned.url], Download(), patience=0.5, timeout=0.3))


def test_a_refusal_ends_the_run_while_another_server_still_works(policy, canned, other):
    over = threading.Event()
    canned.answers |= ready()
    canned.before[GENERATE] = lambda _: over.wait(60)
    other.answers |= ready() | {GENERATE: error(400, "no such parameter")}
    start = time.monotonic()
    try:
        with pytest.raises(ConfigurationError, match=r"refuses .* no such parameter"):
            sample(policy, Servers([canned.url, other.url], Download()), questions=8)
    finally:
        over.set()
    assert time.monotonic() - start < 50


def test_the_key_is_sent_and_a_wrong_one_is_said_to_be(policy, canned, monkeypatch):
    monkeypatch.setenv("KEY_OF_MINE", "open sesame")
    canned.answers |= ready() | answering()
    sample(policy, Servers([canned.url], Download(), key="KEY_OF_MINE"))
    assert {headers["Authorization"] for _, headers in canned.asked} == {"Bearer open sesame"}
    canned.answers[GENERATE] = (401, {"error": "Unauthorized"})
    with pytest.raises(ConfigurationError, match="KEY_OF_MINE holds another key"):
        sample(policy, Servers([canned.url], Download(), key="KEY_OF_MINE"))


def test_a_run_that_is_asked_to_stop_does_not_wait_for_servers(policy, canned):
    canned.answers |= ready() | {GENERATE: error(500, "busy")}
    interrupt.begin_run(None)
    interrupt.open_window()
    threading.Timer(0.3, interrupt.ask, [15]).start()
    start = time.monotonic()
    try:
        with pytest.raises(interrupt.Interrupted):
            sample(policy, Servers([canned.url], Download(), patience=3))
    finally:
        interrupt.reset()
    assert time.monotonic() - start < 2


OLD = [{"version": LABEL, "start": 0, "end": 1}, {"version": "x", "start": 1, "end": 2}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"weight_versions": OLD}, "sampled from weights x, not"),
        ({"weight_versions": []}, "sampled from weights without a label, not"),
        ({"finish_reason": "abort"}, r"unfinished response \(finish reason abort\)"),
        ({"token_ids": [], "logprobs": None, "finish_reason": "abort"}, "unfinished response"),
        ({"token_ids": [], "logprobs": None, "weight_versions": []}, "returned an empty response"),
    ],
    ids=["other weights", "no label", "aborted", "aborted at once", "empty"],
)
def test_faulty_responses_are_never_returned(policy, canned, fault, message):
    token = {"token_id": 5, "logprob": -1.0, "top_logprobs": []}
    choice = {
        "finish_reason": "stop",
        "token_ids": [5, 5],
        "logprobs": {"content": [token, token]},
        "weight_versions": [{"version": LABEL, "start": 0, "end": 2}],
    }
    choices = [choice | {"index": 0}, choice | fault | {"index": 1}]
    canned.answers |= ready() | {GENERATE: (200, {"choices": choices})}
    with pytest.raises(TrainingStopped, match=message):
        sample(policy, Servers([canned.url], Download(), patience=2))


def test_other_ranks_wait_for_rank_0_to_bring_the_weights(policy, canned, ranks):
    canned.answers |= ready() | {"/weight_info": (200, {"weight_version": "default"})}
    with pytest.raises(TrainingStopped, match="'default' and not yet those of rank 0"):
        sample(policy, Servers([canned.url], Download(), patience=0.1, timeout=0.1))


def test_other_ranks_go_on_when_rank_0_has_healed_a_server(policy, canned, ranks):
    """It was restarted: first nobody is there, then it has weights of its own."""
    loaded = ready()
    canned.answers |= loaded | {"/weight_info": error(503, "starting")} | answering()
    fresh = {"/weight_info": (200, {"weight_version": "default"})}
    for seconds, answers in ((0.7, fresh), (1.5, loaded)):
        threading.Timer(seconds, canned.answers.update, [answers]).start()
    rollouts = sample(policy, Servers([canned.url], Download()))
    assert rollouts.ids.tolist() == [[[5], [5]]]
    assert not any(path == "/update_weight_version" for path, _ in canned.asked)


class AtOnce(Delivery):
    """As `Nccl`: to all servers when it is published, and to none later."""

    def __init__(self):
        self.published = 0

    def publish(self, weights, *, version, dtype, servers, loop):
        self.published, self.due = self.published + 1, False
        assert len(list(weights(dtype))) > 10
        for server in servers:
            loop.run(server.label(version))

    async def bring(self, server, timeout):
        self.due = True
        raise NotNow("gets them when they are published")

    def close(self):
        pass


def test_weights_are_published_again_when_the_last_server_lost_them(policy, canned):
    """It is restarted with two of four prompts answered; those are not asked again."""

    def restart(handler):
        if sum(path == GENERATE for path, _ in canned.asked) == 3:
            canned.answers |= ready("default") | {GENERATE: error(500, "going down")}

    follow(canned)
    canned.answers["/collective_rpc"] = (200, {"results": [GOOD | {"max_num_seqs": 1}]})
    canned.before[GENERATE] = restart
    delivery = AtOnce()
    rollouts = sample(policy, Servers([canned.url], delivery), questions=4)
    assert rollouts.ids.tolist() == [[[5], [5]]] * 4 and delivery.published == 2
    assert sum(path == GENERATE for path, _ in canned.asked) == 5


def test_a_server_set_aside_between_two_looks_still_has_its_modules(qwen3, canned, monkeypatch):
    policy = CausalLM(str(qwen3), adapter=Lora(r=4))
    policy.configure_model()
    adapters = {"updates": True, "rank": 16, "modules": ["q_proj", "up_proj"]}
    canned.answers |= ready()
    canned.answers["/collective_rpc"] = (200, {"results": [GOOD | {"adapters": adapters}]})
    engine = Servers([canned.url], Download())
    choose = engine._adaptable

    def set_aside(*given):
        for watched in engine._watched:
            watched.described = None
        raise RuntimeError(f"modules: {choose(*given)}")

    monkeypatch.setattr(engine, "_adaptable", set_aside)
    with pytest.raises(RuntimeError, match=r"modules: \['q_proj', 'up_proj'\]"):
        sample(policy, engine)


def test_ranks_publish_together_once_and_sample_as_often_as_each_likes(policy, canned, monkeypatch):
    """In shards publishing is collective: a rank with fewer batches would be waited for."""
    canned.answers |= ready() | answering()
    engine = Servers([canned.url], Download())
    published = []
    publish = engine._publish
    monkeypatch.setattr(engine, "_publish", lambda *a: (published.append(1), publish(*a)))
    rollout = VLLMRollout(engine)
    prompt = Prompt(key="q", messages=(), verifier=None, answer="", ids=(1, 2))
    try:
        with rollout.hold_weights(policy):
            for _ in range(3):
                rollout.sample(policy, [prompt], Sampling(n=2, max_new_tokens=4))
    finally:
        rollout.close()
    assert len(published) == 1
