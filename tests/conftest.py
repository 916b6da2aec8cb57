"""Fixtures: random checkpoints on disk, made once a session."""

import pytest

from models import olmo3_folder, qwen3_folder
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


@pytest.fixture
def policy(qwen3):
    policy = CausalLM(str(qwen3))
    policy.configure_model()
    return policy


@pytest.fixture(autouse=True)
def no_seed_from_elsewhere(monkeypatch):
    """`seed_everything` leaves its seed in the environment, for this process and its children."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
