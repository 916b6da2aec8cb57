"""vLLM servers over HTTP: parity, and what happens when one is dead, stalled or half-updated."""

import json
import signal
import threading
import time
import urllib.request

import pytest
import torch
from policies import gaps, move

from scsdpo.errors import TrainingStopped
from scsdpo.lab import LabTasks
from scsdpo.policy import CausalLM
from scsdpo.rollout import Download, Servers, SharedFolder, VLLMRollout
from scsdpo.rollout.vllm_server import Server
from scsdpo.types import Prompt, Sampling

SAMPLING = Sampling(n=4, max_new_tokens=48, seed=3)
PARITY = 1e-5


@pytest.fixture
def policy():
    tiny = CausalLM("tiny")
    tiny.configure_model()
    return tiny


@pytest.fixture
def prompts(policy):
    """Three questions of the lab, and one long enough for whole blocks of the prefix cache."""
    asked = [LabTasks("val", size=8)[i] for i in range(8)]
    texts = [p.messages[-1]["content"] for p in asked]
    texts = [*texts[:3], " ".join(texts)[:900]]
    rendered = [policy.chat.render(({"role": "user", "content": text},)) for text in texts]
    assert 256 < len(rendered[-1]) < 460
    return [
        Prompt(key=str(i), messages=(), verifier=None, answer="", ids=ids)
        for i, ids in enumerate(rendered)
    ]


@pytest.fixture(params=["folder", "download"])
def delivery(request, tmp_path):
    return SharedFolder(str(tmp_path / "weights")) if request.param == "folder" else Download()


def rollout(servers, delivery, **settings):
    return VLLMRollout(Servers([server.url for server in servers], delivery, **settings))


def post(server, path, body):
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_weights_reach_every_server_before_each_sampling(two_servers, policy, prompts, delivery):
    engine = rollout(two_servers, delivery)
    seen = []
    for step in range(3):
        rollouts = engine.sample(policy, prompts, SAMPLING)
        assert max(gap.max() for gap in gaps(policy, rollouts)) < PARITY
        assert [Server(s.url).version() for s in two_servers] == [rollouts.version] * 2
        seen.append(rollouts.version)
        move(policy, step, 0.002)
        stale = gaps(policy, rollouts)
        assert all(gap.mean() > 1e-3 for gap in stale)
    assert len(set(seen)) == 3
    engine.close()


def test_prompts_are_spread_and_come_back_in_order(two_servers, policy, prompts, monkeypatch):
    shares = {}
    generate = Server.generate

    def recorded(self, requests, timeout):
        shares[self.url] = [request.ids for request in requests]
        return generate(self, requests, timeout)

    monkeypatch.setattr(Server, "generate", recorded)
    both, one = rollout(two_servers, Download()), rollout(two_servers[:1], Download())
    spread = both.sample(policy, prompts, SAMPLING)
    assert shares[two_servers[0].url] == [prompts[0].ids, prompts[2].ids]
    assert shares[two_servers[1].url] == [prompts[1].ids, prompts[3].ids]
    assert spread.texts == one.sample(policy, prompts, SAMPLING).texts
    fewer = both.sample(policy, prompts[:1], SAMPLING)
    assert fewer.texts == spread.texts[:1]
    both.close()
    one.close()


def test_temperature_is_part_of_the_log_probs(two_servers, policy, prompts):
    engine = rollout(two_servers, Download())
    rollouts = engine.sample(policy, prompts, Sampling(n=4, max_new_tokens=48, temperature=0.7))
    assert max(gap.max() for gap in gaps(policy, rollouts)) < PARITY
    engine.close()


def test_a_stalled_server_is_named_in_bounded_time_and_used_again_when_it_wakes(
    two_servers, policy, prompts, monkeypatch
):
    monkeypatch.setattr("scsdpo.rollout.vllm_server.SHORT", 2.0)
    engine = rollout(two_servers, Download(), patience=2.0, timeout=4.0)
    engine.sample(policy, prompts, SAMPLING)
    stalled = two_servers[1]
    stalled.signal(signal.SIGSTOP)
    start = time.monotonic()
    try:
        with pytest.raises(TrainingStopped, match=f"the vLLM server {stalled.url} is of no use"):
            engine.sample(policy, prompts, SAMPLING)
    finally:
        stalled.signal(signal.SIGCONT)
    assert time.monotonic() - start < 2.0 + 2 * 4.0
    rollouts = engine.sample(policy, prompts, SAMPLING)
    assert max(gap.max() for gap in gaps(policy, rollouts)) < PARITY
    engine.close()


def test_weights_that_change_while_it_samples_are_noticed(
    two_servers, policy, prompts, monkeypatch
):
    """Someone else's label appears midway: those responses are thrown away, not trained on."""
    engine = rollout(two_servers[:1], Download())
    engine.sample(policy, prompts, SAMPLING)
    tries = []
    generate = Server.generate

    def disturbed(self, requests, timeout):
        tries.append(len(requests))
        if len(tries) > 1:
            return generate(self, requests, timeout)
        label = ("/update_weight_version", {"new_version": "another run's"})
        late = threading.Timer(0.05, post, (two_servers[0], *label))
        late.start()
        answers = generate(self, requests, timeout)
        late.join()
        return answers

    monkeypatch.setattr(Server, "generate", disturbed)
    rollouts = engine.sample(policy, prompts, SAMPLING)
    assert tries == [len(prompts)] * 2
    assert max(gap.max() for gap in gaps(policy, rollouts)) < PARITY
    engine.close()


def test_a_load_that_fails_midway_leaves_no_label_and_the_next_one_heals(
    two_servers, policy, prompts, tmp_path, monkeypatch
):
    server = two_servers[0]
    engine = rollout([server], SharedFolder(str(tmp_path / "weights")), patience=1.0)
    engine.sample(policy, prompts, SAMPLING)
    move(policy, 0, 0.002)
    with monkeypatch.context() as broken:
        # The file is there, and ends too soon.
        def truncated(self, files):
            for file in files:
                file.write_bytes(file.read_bytes()[:-100_000])
            return [str(file) for file in files]

        broken.setattr(SharedFolder, "locations", truncated)
        with pytest.raises(TrainingStopped, match=f"{server.url} is of no use since 1 s"):
            engine.sample(policy, prompts, SAMPLING)
    assert Server(server.url).version().startswith("loading ")
    healed = rollout([server], SharedFolder(str(tmp_path / "again")))
    rollouts = healed.sample(policy, prompts, SAMPLING)
    assert max(gap.max() for gap in gaps(policy, rollouts)) < PARITY
    engine.close()
    healed.close()


def test_a_restarted_server_gets_the_weights_again(two_servers, policy, prompts):
    engine = rollout(two_servers, Download(), patience=180.0)
    move(policy, 5, 0.002)
    before = engine.sample(policy, prompts, SAMPLING)
    restarted = two_servers[1]
    restarted.kill()
    restarted.start()  # and sampling does not wait for it to be up
    after = engine.sample(policy, prompts, SAMPLING)
    assert after.texts == before.texts and after.version == before.version
    torch.testing.assert_close(after.policy_logprobs, before.policy_logprobs, rtol=0, atol=PARITY)
    engine.close()
