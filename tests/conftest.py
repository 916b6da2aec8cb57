"""Fixtures: random checkpoints on disk, made once a session."""

import pytest

from expert_models import expert_folder
from models import lfm2_folder, olmo3_folder, qwen3_5_folder, qwen3_folder, qwen3_next_folder
from scsdpo.policy import CausalLM


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    return qwen3_folder(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def qwen3_untied(tmp_path_factory):
    return qwen3_folder(tmp_path_factory.mktemp("qwen3_untied"), tie=False)


@pytest.fixture(scope="session")
def olmo3(tmp_path_factory):
    return olmo3_folder(tmp_path_factory.mktemp("olmo3"))


@pytest.fixture(scope="session")
def qwen3_5(tmp_path_factory):
    return qwen3_5_folder(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="session")
def qwen3_next(tmp_path_factory):
    return qwen3_next_folder(tmp_path_factory.mktemp("qwen3_next"))


@pytest.fixture(scope="session")
def lfm2(tmp_path_factory):
    return lfm2_folder(tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory):
    return expert_folder(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss")


@pytest.fixture
def policy(qwen3):
    policy = CausalLM(str(qwen3))
    policy.configure_model()
    return policy


@pytest.fixture(autouse=True)
def nothing_from_elsewhere(monkeypatch):
    """What runs leave in the environment for their children: a seed, and where ranks meet."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
