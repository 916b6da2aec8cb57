"""What VLLMRollout refuses and says, without vLLM; `make test-vllm` has the real one."""

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.rollout import Colocated, Download, Servers, SharedFolder, VLLMRollout
from scsdpo.rollout.delivery import write_weights
from scsdpo.rollout.versions import Versions
from scsdpo.rollout.weights import StreamHash, merged_weights
from scsdpo.types import Prompt, Sampling

SAMPLING = Sampling(n=2, max_new_tokens=4)
GOOD = {
    "logprobs_mode": "processed_logprobs",
    "quantization": None,
    "dtype": "float32",
    "max_model_len": 512,
}
"""What `WeightReceiver.scsdpo_describe` says of a server that will do."""


class Canned(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM 0.32 does, from `server.answers`: path -> (status, JSON)."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answers.get(self.path, (404, {"detail": "Not Found"}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


LABEL = "run.digest.0"


@pytest.fixture(autouse=True)
def labelled(monkeypatch):
    """The policy's weights have a label that canned servers can know."""
    monkeypatch.setattr(Versions, "of", lambda self, policy: LABEL)


@pytest.fixture
def canned():
    """A server, its `answers` to be filled in."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    server.answers = {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
    with pytest.raises(ConfigurationError, match=r"needs vLLM .* pip install 'scsdpo\[vllm\]'"):
        sample(policy, Colocated())


def test_sleep_on_cpu_is_refused(policy):
    with pytest.raises(ConfigurationError, match=r"engine\.sleep: vLLM ignores it on CPU"):
        sample(policy, Colocated(sleep=True))


def test_ranks_that_cannot_be_grouped_are_refused(policy, ranks):
    with pytest.raises(ConfigurationError, match=r"tensor_parallel: 3 must divide .* ranks, 2:"):
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
        (lambda: Servers(["node:8000"], Download()), "got node:8000"),
        (lambda: Servers(["http://n"], Download(), patience=0), r"`Servers\(patience=\.\.\.\)`"),
        (lambda: SharedFolder("weights"), r"`SharedFolder\(path=\.\.\.\)` must be absolute"),
        (lambda: Download(port=70000), r"`Download\(port=\.\.\.\)` must be in \[0, 65535\]"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def error(code, message):
    return code, {"error": {"message": message, "code": code}}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "was started without VLLM_SERVER_DEV_MODE=1; start it with"),
        (
            {
                "/collective_rpc": error(
                    500,
                    "Call to collective_rpc method failed: Worker failed with error ''CPUWorker' "
                    "object has no attribute 'scsdpo_describe''",
                )
            },
            "was started without --worker-extension-cls scsdpo.rollout.WeightReceiver",
        ),
        (
            {"/collective_rpc": (200, {"results": [GOOD | {"logprobs_mode": "raw_logprobs"}]})},
            "start it with --logprobs-mode processed_logprobs",
        ),
        (
            {"/collective_rpc": (200, {"results": [GOOD | {"quantization": "fp8"}]})},
            r"holds its weights quantised \(fp8\)",
        ),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused_with_the_flag(
    policy, canned, answers, message
):
    canned.answers |= answers
    with pytest.raises(ConfigurationError, match=message) as refused:
        sample(policy, Servers([canned.url], Download(), patience=0.1))
    assert canned.url in str(refused.value)


def ready():
    """The answers of a server that has these weights; it cannot generate yet."""
    return {
        "/collective_rpc": (200, {"results": [GOOD]}),
        "/weight_info": (200, {"weight_version": LABEL}),
    }


def test_a_server_without_room_for_a_response_is_refused_with_the_flag(policy, canned):
    small = {"results": [GOOD | {"max_model_len": 10}]}
    canned.answers |= ready() | {"/collective_rpc": (200, small)}
    message = f"room for 10: start the server {canned.url} with a larger --max-model-len"
    with pytest.raises(ConfigurationError, match=message):
        sample(policy, Servers([canned.url], Download(), patience=0.1))


def test_a_server_without_scale_out_is_refused_with_the_flag(policy, canned):
    said = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to ..."
    canned.answers |= ready() | {"/inference/v1/generate": error(403, said)}
    with pytest.raises(ConfigurationError, match="was started without --enable-scale-out"):
        sample(policy, Servers([canned.url], Download(), patience=0.1))


def test_servers_of_different_dtypes_are_refused(policy, canned):
    canned.answers |= ready()
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    bf16 = {"results": [GOOD | {"dtype": "bfloat16"}]}
    other.answers = {"/collective_rpc": (200, bf16)}
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{other.server_address[1]}"
        with pytest.raises(ConfigurationError, match=r"different dtypes \(bfloat16, float32\)"):
            sample(policy, Servers([canned.url, url], Download()))
    finally:
        other.shutdown()
        thread.join()
        other.server_close()


def test_nobody_at_the_url_ends_in_bounded_time_with_its_name(policy, canned):
    canned.answers |= ready()
    gone = "http://127.0.0.1:9"
    start = time.monotonic()
    with pytest.raises(TrainingStopped, match=f"the vLLM server {gone} is of no use since 0.2 s"):
        sample(policy, Servers([canned.url, gone], Download(), patience=0.2))
    assert time.monotonic() - start < 5


def test_a_server_that_is_not_well_is_asked_again(policy, canned):
    token = {"token_id": 5, "logprob": -1.0, "top_logprobs": []}
    choice = {
        "finish_reason": "stop",
        "token_ids": [5],
        "logprobs": {"content": [token]},
        "weight_versions": [{"version": LABEL, "start": 0, "end": 1}],
    }
    healthy = {"choices": [choice | {"index": i} for i in (1, 0)]}
    path = "/inference/v1/generate"
    canned.answers |= ready() | {path: error(500, "EngineCore encountered an issue")}
    recovery = threading.Timer(0.7, canned.answers.update, [{path: (200, healthy)}])
    recovery.start()
    rollouts = sample(policy, Servers([canned.url], Download(), patience=10))
    recovery.join()
    assert rollouts.ids.tolist() == [[[5], [5]]] and rollouts.finished.all()
    assert rollouts.sampling_logprobs.tolist() == [[[-1.0], [-1.0]]]
    assert rollouts.version == LABEL


def test_a_run_that_is_asked_to_stop_does_not_wait_for_servers(policy, canned):
    canned.answers |= ready() | {"/inference/v1/generate": error(500, "busy")}
    interrupt.begin_run(None)
    interrupt.open_window()
    threading.Timer(0.3, interrupt.ask, [15]).start()
    start = time.monotonic()
    try:
        with pytest.raises(interrupt.Interrupted):
            sample(policy, Servers([canned.url], Download(), patience=3))
    finally:
        interrupt.reset()
    assert time.monotonic() - start < 2


OLD = [{"version": LABEL, "start": 0, "end": 1}, {"version": "x", "start": 1, "end": 2}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"weight_versions": OLD}, "sampled from weights x, not"),
        ({"weight_versions": []}, "sampled from weights without a label, not"),
        ({"finish_reason": "abort"}, r"not finished \(finish reason abort\)"),
        ({"token_ids": [], "logprobs": None, "finish_reason": "abort"}, "not finished"),
        ({"token_ids": [], "logprobs": None, "weight_versions": []}, "gave an empty response"),
    ],
    ids=["other weights", "no label", "aborted", "aborted at once", "empty"],
)
def test_faulty_responses_are_never_returned(policy, canned, fault, message):
    token = {"token_id": 5, "logprob": -1.0, "top_logprobs": []}
    choice = {
        "finish_reason": "stop",
        "token_ids": [5, 5],
        "logprobs": {"content": [token, token]},
        "weight_versions": [{"version": LABEL, "start": 0, "end": 2}],
    }
    choices = [choice | {"index": 0}, choice | fault | {"index": 1}]
    canned.answers |= ready() | {"/inference/v1/generate": (200, {"choices": choices})}
    with pytest.raises(TrainingStopped, match=message):
        sample(policy, Servers([canned.url], Download(), patience=0.1))


def test_other_ranks_wait_for_rank_0_to_bring_the_weights(policy, canned, ranks):
    canned.answers |= ready() | {"/weight_info": (200, {"weight_version": "default"})}
    with pytest.raises(TrainingStopped, match="has not got these weights from rank 0 yet"):
        sample(policy, Servers([canned.url], Download(), patience=0.1, timeout=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_every_weight(policy, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("scsdpo.rollout.delivery._SHARD_BYTES", 50_000)
    folder = tmp_path / "weights"
    files, sent = write_weights(merged_weights(policy), folder, dtype=dtype, keep=True)
    assert len(files) > 2 and sorted(folder.iterdir()) == files
    found = {name: value for file in files for name, value in load_file(file).items()}
    for name, value in merged_weights(policy):
        assert torch.equal(found[name], value.to(dtype))
    stream = StreamHash()
    assert len(list(stream.over(found.items()))) == len(list(merged_weights(policy)))
    assert stream.hexdigest() == sent
    assert write_weights(merged_weights(policy), folder, dtype=dtype, keep=False)[0] == []


def test_a_download_serves_its_files_and_nothing_else():
    delivery = Download()
    file = delivery.open() / "version" / "00000.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    (url,) = delivery.locations([file])
    with urllib.request.urlopen(url) as body:
        assert body.read() == b"weights"
    assert delivery.open() == file.parents[1]
    root = "/".join(url.split("/")[:3])
    for path in ("/", "/" + url.split("/")[3] + "/"):
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            urllib.request.urlopen(root + path)
        refused.value.close()
    delivery.close()
    assert not file.exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)


def test_a_shared_folder_stays_when_the_run_ends(tmp_path):
    delivery = SharedFolder(str(tmp_path / "weights"))
    assert delivery.open() == tmp_path / "weights"
    assert delivery.locations([tmp_path / "weights" / "a"]) == [str(tmp_path / "weights" / "a")]
    delivery.close()
    assert (tmp_path / "weights").is_dir()


def test_nothing_of_vllm_is_imported_before_it_is_used():
    code = (
        "import sys, scsdpo.cli.lightning_cli; print([m for m in sys.modules if m[:4] == 'vllm'])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.stdout.decode().strip() == "[]"
