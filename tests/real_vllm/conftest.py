"""The real vLLM, on CPU: `make test-vllm`. Nothing here is skipped: without vLLM it fails."""

import pytest
from servers import KEY, Running, all_running

from scsdpo.policy import CausalLM

VLLMS_OWN = (
    "ignore:.*torch.distributed.reduce_op:FutureWarning",
    "ignore:.*NUMA binding:UserWarning",
)
"""Warnings of vLLM 0.32 itself under torch 2.13."""


def pytest_configure(config):
    for line in VLLMS_OWN:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """Of the servers."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture
def policy():
    tiny = CausalLM("tiny")
    tiny.configure_model()
    return tiny


@pytest.fixture(scope="session")
def two_servers(tmp_path_factory):
    """Two servers of the shipped policy; a test that harms one leaves it well."""
    folder = tmp_path_factory.mktemp("servers")
    with all_running(Running(folder), Running(folder)) as servers:
        yield servers


def pytest_sessionfinish(session):
    """A skip is a failure: what is not run here is run nowhere."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
