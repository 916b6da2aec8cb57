"""What VLLMRollout refuses and says, without vLLM; `make test-vllm` has the real one."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch.distributed as dist

from scsdpo.errors import ConfigurationError
from scsdpo.rollout import Colocated, Download, Servers, SharedFolder, VLLMRollout
from scsdpo.rollout.vllm.rollout import Request
from scsdpo.types import Prompt, Sampling

SAMPLING = Sampling(n=2, max_new_tokens=4)


@pytest.fixture
def ranks():
    """This process is rank 1 of two."""
    dist.init_process_group("fake", rank=1, world_size=2, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sample(policy, engine, **sampling):
    ids = policy.chat.render(({"role": "user", "content": "Why?"},))
    asked = Prompt(key="0", messages=(), verifier=None, answer="", ids=ids)
    rollout = VLLMRollout(engine)
    try:
        return rollout.sample(
            policy, [asked], Sampling(**({"n": 2, "max_new_tokens": 4} | sampling))
        )
    finally:
        rollout.close()


needs_its_absence = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is installed: see tests/real_vllm"
)


@needs_its_absence
def test_without_vllm_the_remedy_is_named(policy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(
        ConfigurationError, match=r"needs vLLM, which is .*: use HFRollout, or .*docs/vllm.md"
    ):
        sample(policy, Colocated())


def test_sleep_on_cpu_is_refused(policy):
    with pytest.raises(ConfigurationError, match=r"engine\.sleep: vLLM frees no memory on CPU"):
        sample(policy, Colocated(sleep=True))


def test_ranks_that_cannot_be_grouped_are_refused(policy, ranks):
    with pytest.raises(
        ConfigurationError, match=r"tensor_parallel: 3 does not divide .* ranks, 2:"
    ):
        sample(policy, Colocated(tensor_parallel=3))


@needs_its_absence
def test_threads_that_would_spin_are_warned_of(policy, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    warned = pytest.warns(UserWarning, match="OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE")
    with warned, pytest.raises(ConfigurationError, match="needs vLLM"):
        sample(policy, Colocated())


def test_a_prompt_without_room_for_a_response_is_refused(policy):
    with pytest.raises(ConfigurationError, match=r"raise model\.rollout\.engine\.max_model_len"):
        sample(policy, Colocated(max_model_len=8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Colocated(kv_cache_gib=0), r"`Colocated\(kv_cache_gib=\.\.\.\)` must be > 0"),
        (lambda: Colocated(tensor_parallel=0), r"`Colocated\(tensor_parallel=\.\.\.\)` must be"),
        (lambda: Servers([], Download()), r"`Servers\(urls=\.\.\.\)` must be URLs .* got none"),
        (lambda: Servers(["http://h:99999"], Download()), r"must be URLs .* got http://h:99999"),
        (lambda: Servers(["http://"], Download()), r"must be URLs .* got http://"),
        (lambda: Servers(["node:8000"], Download()), "got node:8000"),
        (lambda: Servers(["http://n"], Download(), patience=0), r"`Servers\(patience=\.\.\.\)`"),
        (lambda: Servers(["http://n"], Download(), key="s3-cret"), "must be the name of an env"),
        (lambda: SharedFolder("weights"), r"`SharedFolder\(path=\.\.\.\)` must be absolute"),
        (lambda: Download(port=70000), r"`Download\(port=\.\.\.\)` must be in \[0, 65535\]"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_of_vllm_is_imported_before_it_is_used():
    code = (
        "import sys, scsdpo.cli.lightning_cli; print([m for m in sys.modules if m[:4] == 'vllm'])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.stdout.decode().strip() == "[]"


def test_copies_of_a_question_are_seeded_as_if_it_had_more_responses(policy):
    """vLLM seeds response i with the request's seed + i."""
    asked = Prompt(key="0", messages=(), verifier=None, answer="", ids=(1,))
    first, third = (
        Request.of(prompt, SAMPLING, policy).parameters["seed"]
        for prompt in (asked, replace(asked, copy=2))
    )
    assert third == first + 2 * SAMPLING.n < 2**63
