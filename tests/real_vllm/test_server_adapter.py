"""LoRA's adapter alone in vLLM servers."""

import asyncio

import pytest
from adapters import SAMPLING, check_sample, check_steps
from policies import lora_policy, move, short_and_long
from servers import Running, all_running

from models import qwen3_folder
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.rollout import Download, Servers, SharedFolder, VLLMRollout
from scsdpo.rollout.servers.server import Server
from scsdpo.rollout.weights import files


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return qwen3_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def servers(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    flags = ("--enable-lora", "--max-lora-rank=8")
    started = [
        Running(folder, *flags, model=base, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") for _ in range(2)
    ]
    with all_running(*started) as servers:
        yield servers


@pytest.fixture(params=["folder", "download"])
def delivery(request, tmp_path):
    return SharedFolder(str(tmp_path / "weights")) if request.param == "folder" else Download()


def engine(servers, delivery, adapter="auto", **settings):
    return Servers([server.url for server in servers], delivery, adapter=adapter, **settings)


@pytest.fixture
def loads(monkeypatch):
    """What servers were told to load."""
    seen = []
    for name in ("load", "load_adapter"):
        plain = getattr(Server, name)

        async def counted(self, *args, plain=plain, name=name):
            seen.append((self.url, name))
            await plain(self, *args)

        monkeypatch.setattr(Server, name, counted)
    return seen


def test_the_adapter_alone_is_the_policy_at_every_step(base, servers, delivery, loads):
    policy, rollout = lora_policy(base), VLLMRollout(engine(servers, delivery))
    check_steps(rollout, policy, steps=3)
    for server in servers:
        kinds = [kind for url, kind in loads if url == server.url]
        assert kinds.count("load") <= 1  # the base, if it has not got it from another test
        assert kinds.count("load_adapter") >= 2


def test_a_restarted_server_gets_base_and_adapter_again(base, servers):
    policy = lora_policy(base)
    rollout = VLLMRollout(engine(servers[:1], Download(), patience=180.0))
    move(policy, 5, 0.01)
    before = rollout.sample(policy, short_and_long(policy), SAMPLING)
    servers[0].kill()
    servers[0].start()
    after = rollout.sample(policy, short_and_long(policy), SAMPLING)
    rollout.close()
    assert after.texts == before.texts and after.version == before.version


def test_another_adapter_than_was_sent_is_refused(base, servers, tmp_path, monkeypatch):
    policy = lora_policy(base)
    write = files.save_file

    def written(values, path):
        name = next(iter(values))
        write(values | {name: values[name] * 1.5}, path)

    rollout = VLLMRollout(engine(servers[:1], Download(), patience=2.0))
    with monkeypatch.context() as harmed:
        harmed.setattr(files, "save_file", written)
        with pytest.raises(TrainingStopped, match="holds another adapter"):
            rollout.sample(policy, short_and_long(policy), SAMPLING)
    assert servers[0].version.startswith("loading ")
    rollout.versions.moved()
    check_sample(rollout, policy)
    rollout.close()


def test_merged_and_alone_take_turns_on_one_server(base, servers):
    policy = lora_policy(base)
    for adapter in ("alone", "merged", "alone"):
        rollout = VLLMRollout(engine(servers[:1], Download(), adapter))
        check_sample(rollout, policy)
        (held,) = {asyncio.run(Server(servers[0].url).describe())["adapter"]}
        assert bool(held) == (adapter == "alone")
        rollout.close()


def test_a_rank_that_servers_have_no_room_for_is_merged_or_refused(base, servers):
    policy = lora_policy(base, r=9)
    rollout = VLLMRollout(engine(servers[:1], Download()))
    check_sample(rollout, policy)
    rollout.close()
    rollout = VLLMRollout(engine(servers[:1], Download(), "alone"))
    with pytest.raises(
        ConfigurationError, match="does not support adapters of rank 16: start it with"
    ):
        rollout.sample(policy, short_and_long(policy), SAMPLING)
    rollout.close()
