"""What is sent over NCCL, and who joins; tests/real_vllm has vLLM's own engines."""

import asyncio
import importlib.util

import pytest
import torch

from canned_vllm import error, serving
from scsdpo.errors import ConfigurationError
from scsdpo.rollout import Nccl
from scsdpo.rollout.servers.event_loop import EventLoop
from scsdpo.rollout.servers.nccl import TransferFailed, TransferGroup, WeightSource
from scsdpo.rollout.servers.server import Server, Unreachable
from scsdpo.rollout.weights.hashing import StreamHash

WEIGHTS = [("a", torch.arange(3.0)), ("b", torch.ones(2, 2)), ("c", torch.zeros(3) + 7)]


def sent(source):
    return [(name, value.tolist()) for name, value in source]


def test_what_was_declared_is_sent_and_hashed():
    source = WeightSource()
    source.declare(lambda: iter(WEIGHTS))
    assert [tuple(each) for each in source.metadata()] == [
        (name, torch.float32, tuple(value.shape)) for name, value in WEIGHTS
    ]
    stream = StreamHash()
    for name, value in stream.over(WEIGHTS):
        assert (name, value.tolist()) in sent(source)
    assert source.hash.hexdigest() == stream.hexdigest() and source.error is None


def broken():
    yield WEIGHTS[0]
    raise MemoryError("no room for b")


@pytest.mark.parametrize(
    ("comes", "wrong"),
    [
        ([WEIGHTS[0], WEIGHTS[2]], "name='c'"),
        (WEIGHTS[:1], "'nothing'"),
        ([WEIGHTS[0], ("b", torch.ones(4))], r"shape=\(4,\)"),
        ([WEIGHTS[0], ("b", torch.ones(2, 2).double())], "float64"),
        (None, "no room for b"),
    ],
    ids=["left out", "too few", "shape", "dtype", "raises"],
)
def test_workers_never_wait_for_a_tensor_that_does_not_come(comes, wrong):
    source = WeightSource()
    source.declare(lambda: iter(WEIGHTS))
    source.declare(broken if comes is None else lambda: iter(comes))
    zeros = [("b", [[0.0, 0.0], [0.0, 0.0]]), ("c", [0.0, 0.0, 0.0])]
    assert sent(source) == [("a", [0.0, 1.0, 2.0]), *zeros]
    with pytest.raises((ValueError, MemoryError), match=wrong):
        raise source.error
    source.declare(lambda: iter(WEIGHTS))
    assert len(sent(source)) == 3 and source.error is None


class Endpoint:
    """What is asked of one server."""

    def __init__(self, fails=False):
        self.asked, self.fails, self.url = [], fails, "http://here"

    async def join(self, init_info, timeout):
        self.asked.append(init_info)
        if self.fails:
            raise Unreachable("is gone")


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


def test_workers_have_ranks_of_their_own(loop):
    servers = {Endpoint(): 2, Endpoint(): 3, Endpoint(): 1}
    TransferGroup(servers, loop, 1.0).init_weight_transfer_engine(
        {"world_size": 7, "rank_offset": 1}
    )
    offsets = [server.asked[0]["rank_offset"] for server in servers]
    assert offsets == [1, 3, 6] and 1 + sum(servers.values()) == 7


def test_a_server_that_does_not_join_ends_the_wait_for_the_others(loop):
    group = TransferGroup({Endpoint(): 1, Endpoint(fails=True): 1}, loop, timeout=3600.0)
    with pytest.raises(Unreachable, match="is gone"):
        group.init_weight_transfer_engine({})
    with pytest.raises(TransferFailed, match="is gone"):
        group._wait(asyncio.run_coroutine_threadsafe(asyncio.sleep(3600), loop._loop))


def test_a_server_without_the_engine_is_refused_with_the_flag():
    said = "Call to init_weight_transfer_engine failed: Weight transfer not configured. Please set"
    with serving() as server:
        server.answers |= {
            "/shutdown_weight_transfer_engine": (200, {}),
            "/init_weight_transfer_engine": error(500, said),
        }
        flag = r"started without --weight-transfer-config '\{\"backend\": \"nccl\"\}': start it"
        with pytest.raises(ConfigurationError, match=flag):
            asyncio.run(Server(server.url).join({}, 5.0))


def publish(delivery):
    delivery.publish(iter, version="v", dtype=torch.float32, servers=(), loop=None)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_remedy_is_named():
    with pytest.raises(ConfigurationError, match=r"Nccl .*: pip install 'scsdpo\[vllm\]'"):
        publish(Nccl())


@pytest.mark.parametrize("setting", ["timeout", "buffer_gib"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=rf"`Nccl\({setting}=\.\.\.\)` must be > 0"):
        Nccl(**{setting: 0})
