"""Weights by vLLM's own trainer and worker engines, gloo in NCCL's place: see gloo_transfer."""

import os
from dataclasses import replace
from pathlib import Path

import gloo_transfer  # noqa: F401 - for what it puts in place
import pytest
from policies import check_parity, gaps, move, short_and_long
from servers import Running, all_running, wait_for

from scsdpo.rollout import Nccl, Servers, VLLMRollout
from scsdpo.rollout.servers.nccl import Declared, WeightSource
from scsdpo.types import Sampling

SAMPLING = Sampling(n=4, max_new_tokens=24, seed=3)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One of one worker and one of two, with gloo in NCCL's place."""
    folder = tmp_path_factory.mktemp("nccl")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    flags = (
        "--worker-extension-cls=gloo_transfer.GlooReceiver",
        '--weight-transfer-config={"backend": "nccl"}',
    )
    started = [Running(folder, *flags), Running(folder, *flags, "--tensor-parallel-size=2")]
    with all_running(*started) as servers:
        yield servers


@pytest.fixture
def rollout(servers, monkeypatch):
    """The buffer holds a part of the weights: several go out one after the other."""
    monkeypatch.setattr("scsdpo.rollout.servers.nccl._check_place", lambda: None)
    delivery = Nccl(timeout=10.0, buffer_gib=2**-11)
    made = VLLMRollout(Servers([server.url for server in servers], delivery))
    yield made
    made.close()


def check(policy, rollout, seed=3):
    rollouts = rollout.sample(policy, short_and_long(policy), replace(SAMPLING, seed=seed))
    check_parity(policy, rollouts)
    return rollouts


def test_weights_reach_both_servers_before_each_sampling(servers, policy, rollout):
    groups = set()
    for step in range(3):
        rollouts = check(policy, rollout, step)
        assert [server.version for server in servers] == [rollouts.version] * 2
        groups.add(rollout.engine.delivery._group)
        move(policy, step, 0.002)
        assert all(gap.mean() > 1e-3 for gap in gaps(policy, rollouts))
    assert len(groups) == 1


@pytest.mark.parametrize("wrong", ["order", "shape"])
def test_a_transfer_whose_declaration_is_wrong_is_made_again(servers, policy, rollout, wrong):
    """In another order zeros are sent to the end; another shape a worker refuses midway."""
    check(policy, rollout)
    group = rollout.engine.delivery._group
    declared = group.source.declared
    q = next(i for i, each in enumerate(declared) if each.name.endswith("q_proj.weight"))
    if wrong == "order":
        declared[q - 1], declared[q] = declared[q], declared[q - 1]
    else:
        rows, columns = declared[q].shape
        declared[q] = Declared(declared[q].name, declared[q].dtype, (rows + 1, columns))
    move(policy, 9, 0.002)
    rollouts = check(policy, rollout)
    assert rollout.engine.delivery._group is not group
    assert [server.version for server in servers] == [rollouts.version] * 2


def test_a_server_that_dies_in_mid_transfer_is_left_out_and_healed_when_it_is_back(
    servers, policy, rollout, monkeypatch
):
    check(policy, rollout)
    other, victim = servers
    following = WeightSource._next
    sent = []

    def killing(self, stream, expected):
        sent.append(expected)
        if len(sent) == len(self.declared) // 2:
            victim.kill()
        return following(self, stream, expected)

    monkeypatch.setattr(WeightSource, "_next", killing)
    move(policy, 10, 0.002)
    rollouts = check(policy, rollout)
    assert other.version == rollouts.version
    victim.start()
    victim.wait()
    wait_for(lambda: rollout.engine.delivery.due)
    assert check(policy, rollout).version == rollouts.version
    assert [server.version for server in servers] == [rollouts.version] * 2
    move(policy, 11, 0.002)
    rollouts = check(policy, rollout)
    assert [server.version for server in servers] == [rollouts.version] * 2
