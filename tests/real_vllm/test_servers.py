"""vLLM servers over HTTP: parity, and what happens when one is dead, stalled or half-updated."""

import asyncio
import copy
import json
import signal
import time
import urllib.error
import urllib.request

import pytest
import torch
from policies import check_parity, gaps, move
from servers import KEY, wait_for

from precision import allowed
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.lab import LabTasks
from scsdpo.metrics import GapCheck
from scsdpo.rollout import Download, Servers, SharedFolder, VLLMRollout
from scsdpo.rollout.servers.server import Server
from scsdpo.training.self_check import examine
from scsdpo.types import Prompt, Sampling

SAMPLING = Sampling(n=4, max_new_tokens=48, seed=3)


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
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_the_self_check_asks_them(two_servers, policy, delivery):
    engine = rollout(two_servers, delivery)
    (*_, found), left_out = examine(policy, {}, engine, 1.0, GapCheck())
    engine.close()
    assert (found.path, found.fault, left_out) == ("VLLMRollout", "", "")
    assert found.apart < 1e-3


def test_weights_reach_every_server_before_each_sampling(two_servers, policy, prompts, delivery):
    engine = rollout(two_servers, delivery)
    seen = []
    for step in range(3):
        rollouts = engine.sample(policy, prompts, SAMPLING)
        check_parity(policy, rollouts)
        assert rollouts.version in [server.version for server in two_servers]
        seen.append(rollouts.version)
        move(policy, step, 0.002)
        stale = gaps(policy, rollouts)
        assert all(gap.mean() > 1e-3 for gap in stale)
    assert len(set(seen)) == 3
    engine.close()


def test_each_token_is_of_the_weights_that_are_said_to_have_drawn_it_also_within_a_response(
    two_servers, policy, prompts
):
    """Responses are frozen while weights change, and go on with keys and values made anew."""
    engine = rollout(two_servers, Download())
    drawings, states = [], {}
    sampling = Sampling(n=4, max_new_tokens=300, temperature=2.0, seed=3)
    for step in range(4):
        drawings.append(engine.begin(policy, prompts[:3], sampling.at(step), within=True))
        states[drawings[-1].label] = copy.deepcopy(policy.state_dict())
        time.sleep(0.3)
        move(policy, step, 0.002)
    mixed = 0
    for drawing in drawings:
        responses = drawing.responses()
        drew, sampled = responses.versions, responses.sampled
        mixed += int(((drew != drew[..., :1]) & sampled).any(-1).sum())
        for number, label in enumerate(responses.labels):
            policy.load_state_dict(states[label])
            own = [each[here] == number for each, here in zip(drew, sampled, strict=True)]
            apart = torch.cat([g[o] for g, o in zip(gaps(policy, responses), own, strict=True)])
            assert not len(apart) or float(apart.max()) < allowed(policy, responses)
    assert mixed > 0
    engine.close()


def test_prompts_are_spread_and_come_back_in_order(two_servers, policy, prompts, monkeypatch):
    asked = {server.url: 0 for server in two_servers}
    generate = Server.generate

    async def recorded(self, request, timeout, adapter=""):
        asked[self.url] += 1
        return await generate(self, request, timeout)

    monkeypatch.setattr(Server, "generate", recorded)
    both, one = rollout(two_servers, Download()), rollout(two_servers[:1], Download())
    both.sample(policy, prompts, SAMPLING)
    wait_for(lambda: two_servers[0].version == two_servers[1].version)
    # Before, a server that was slow to load may have had none, or may have been asked again.
    asked.update(dict.fromkeys(asked, 0))
    spread = both.sample(policy, prompts, SAMPLING)
    assert [*asked.values()] == [2, 2]
    assert spread.texts == one.sample(policy, prompts, SAMPLING).texts
    fewer = both.sample(policy, prompts[:1], SAMPLING)
    assert fewer.texts == spread.texts[:1]
    both.close()
    one.close()


def test_temperature_is_part_of_the_log_probs(two_servers, policy, prompts):
    engine = rollout(two_servers, Download())
    rollouts = engine.sample(policy, prompts, Sampling(n=4, max_new_tokens=48, temperature=0.7))
    check_parity(policy, rollouts)
    engine.close()


def test_a_stalled_server_costs_its_own_share_and_is_used_again_when_it_wakes(
    two_servers, policy, prompts, monkeypatch
):
    monkeypatch.setattr("scsdpo.rollout.servers.server.SHORT", 2.0)
    monkeypatch.setattr("scsdpo.rollout.servers.watched_server._LOOK", 0.5)
    engine = rollout(two_servers, Download(), patience=4.0)
    before = engine.sample(policy, prompts, SAMPLING)
    wait_for(lambda: two_servers[0].version == two_servers[1].version)
    stalled = two_servers[1]
    stalled.signal(signal.SIGSTOP)
    try:
        after = engine.sample(policy, prompts, SAMPLING)
        assert after.texts == before.texts
        move(policy, 1, 0.002)
        rollouts = engine.sample(policy, prompts, SAMPLING)
    finally:
        stalled.signal(signal.SIGCONT)
    check_parity(policy, rollouts)
    wait_for(lambda: stalled.version == rollouts.version)
    engine.close()


def test_a_run_whose_only_server_stalls_ends_with_its_name(
    two_servers, policy, prompts, monkeypatch
):
    monkeypatch.setattr("scsdpo.rollout.servers.server.SHORT", 1.0)
    monkeypatch.setattr("scsdpo.rollout.servers.watched_server._LOOK", 0.5)
    stalled = two_servers[1]
    engine = rollout([stalled], Download(), patience=3.0)
    engine.sample(policy, prompts, SAMPLING)
    stalled.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TrainingStopped, match=rf"no vLLM server could be .*{stalled.url}: "):
            engine.sample(policy, prompts, SAMPLING)
    finally:
        stalled.signal(signal.SIGCONT)
    rollouts = engine.sample(policy, prompts, SAMPLING)
    check_parity(policy, rollouts)
    engine.close()


def test_weights_that_change_while_it_samples_are_noticed(
    two_servers, policy, prompts, monkeypatch
):
    """Someone else's label appears midway: those responses are thrown away, not trained on."""
    engine = rollout(two_servers[:1], Download())
    engine.sample(policy, prompts, SAMPLING)
    tries = []
    generate = Server.generate

    async def disturbed(self, request, timeout, adapter=""):
        tries.append(request.ids)
        if len(tries) == 1:
            label = ("/update_weight_version", {"new_version": "another run's"})
            await asyncio.to_thread(post, two_servers[0], *label)
        return await generate(self, request, timeout)

    monkeypatch.setattr(Server, "generate", disturbed)
    rollouts = engine.sample(policy, prompts, SAMPLING)
    assert len(tries) > len(prompts)
    check_parity(policy, rollouts)
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
        with pytest.raises(TrainingStopped, match=f"{server.url}: /collective_rpc: status 500"):
            engine.sample(policy, prompts, SAMPLING)
    assert server.version.startswith("loading ")
    healed = rollout([server], SharedFolder(str(tmp_path / "again")))
    rollouts = healed.sample(policy, prompts, SAMPLING)
    check_parity(policy, rollouts)
    engine.close()
    healed.close()


def test_a_restarted_server_gets_the_weights_again_while_nobody_samples(
    two_servers, policy, prompts
):
    engine = rollout(two_servers, Download())
    move(policy, 5, 0.002)
    before = engine.sample(policy, prompts, SAMPLING)
    restarted = two_servers[1]
    restarted.kill()
    after = engine.sample(policy, prompts, SAMPLING)
    assert after.texts == before.texts and after.version == before.version
    restarted.start()
    restarted.wait()
    wait_for(lambda: restarted.version == before.version)
    alone = rollout([restarted], Download()).sample(policy, prompts, SAMPLING)
    assert alone.texts == before.texts
    torch.testing.assert_close(
        alone.policy_logprobs, before.policy_logprobs, rtol=0, atol=allowed(policy, before)
    )
    engine.close()


def test_without_the_key_nothing_is_answered_and_the_error_says_so(
    two_servers, policy, prompts, monkeypatch
):
    for path in ("/weight_info", "/inference/v1/generate", "/collective_rpc"):
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(two_servers[0].url + path)
        refused.value.close()
    engine = rollout(two_servers, Download())
    for key, message in (("", "is not set"), ("wrong", "holds another key")):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(ConfigurationError, match=f"needs a key, .* VLLM_API_KEY {message}: "):
            engine.sample(policy, prompts, SAMPLING)
        engine.close()
