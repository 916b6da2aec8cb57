"""How weights get to servers: files, their folders, and who may ask for them."""

import asyncio
import fcntl
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file

from scsdpo.rollout import Download, RequireKey, SharedFolder
from scsdpo.rollout.servers.delivery import RunFolder, _Quiet
from scsdpo.rollout.servers.server import Unreachable
from scsdpo.rollout.weights.files import write_weights
from scsdpo.rollout.weights.hashing import StreamHash
from scsdpo.rollout.weights.stream import merged_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_every_weight(policy, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("scsdpo.rollout.weights.files._SHARD_BYTES", 50_000)
    folder = tmp_path / "weights"
    files, sent = write_weights(merged_weights(policy, dtype), folder)
    assert len(files) > 2 and sorted(folder.iterdir()) == files
    found = {name: value for file in files for name, value in load_file(file).items()}
    for name, value in merged_weights(policy):
        assert torch.equal(found[name], value.to(dtype))
    stream = StreamHash()
    assert len(list(stream.over(found.items()))) == len(list(merged_weights(policy)))
    assert stream.hexdigest() == sent


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


def publish(delivery, value, version):
    delivery.publish(
        lambda dtype: iter([("w", torch.full((4,), float(value), dtype=dtype))]),
        version=version,
        dtype=torch.float32,
        servers=(),
        loop=None,
    )


class Loading:
    """A server that loads until it is let go."""

    def __init__(self):
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.read = []

    async def load(self, locations, sent, version, timeout):
        self.begun.set()
        await self.go.wait()
        self.read = [load_file(path)["w"][0].item() for path in locations]


def test_one_version_lies_in_the_folder_at_a_time(tmp_path):
    delivery = SharedFolder(str(tmp_path))
    for version in ("1", "2", "3"):
        publish(delivery, version, version)
        assert [path.parent.name for path in tmp_path.glob("*/*/*.safetensors")] == [version]
    delivery.close()
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_a_version_that_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("scsdpo.rollout.weights.files._SHARD_BYTES", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    delivery = SharedFolder(str(tmp_path))
    publish(delivery, 1, "1")
    with monkeypatch.context() as disk:
        disk.setattr("scsdpo.rollout.weights.files.save_file", full)
        with pytest.raises(OSError, match="No space"):
            publish(delivery, 2, "2")
    assert not list(tmp_path.glob("*/*/*"))
    publish(delivery, 3, "3")
    assert [path.parent.name for path in tmp_path.glob("*/*/*.safetensors")] == ["3"]
    delivery.close()


def test_files_stay_while_a_server_reads_them_and_go_when_it_is_done(tmp_path):
    async def run():
        server = Loading()
        load = asyncio.create_task(delivery.bring(server, 1.0))
        await server.begun.wait()
        publish(delivery, 2, "2")
        assert len(list(tmp_path.glob("*/*/*.safetensors"))) == 2
        server.go.set()
        await load
        assert server.read == [1.0]

    delivery = SharedFolder(str(tmp_path))
    publish(delivery, 1, "1")
    asyncio.run(run())
    assert [path.parent.name for path in tmp_path.glob("*/*/*.safetensors")] == ["2"]
    delivery.close()
    with pytest.raises(Unreachable, match="no weights are published"):
        asyncio.run(delivery.bring(Loading(), 1.0))


def test_two_runs_in_one_folder_leave_each_others_files(tmp_path):
    first, second = SharedFolder(str(tmp_path)), SharedFolder(str(tmp_path))
    publish(first, 1, "same")
    publish(second, 2, "same")
    publish(second, 3, "next")
    second.close()
    assert [path.parent.name for path in tmp_path.glob("*/*/*.safetensors")] == ["same"]
    first.close()
    assert tmp_path.is_dir()  # the user's


KILLED = """
import os, sys
from pathlib import Path
from scsdpo.rollout.servers.delivery import _Quiet
from scsdpo.rollout.servers.delivery import RunFolder
folder = RunFolder(Path(sys.argv[1]))
(folder.path / "weights").write_bytes(b"16 GB")
os.kill(os.getpid(), 9)
"""


def test_the_folder_of_a_killed_run_is_removed_by_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)])
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert (left / "weights").exists()
    folder = RunFolder(tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path]
    folder.close()


def test_folders_of_others_stay(tmp_path):
    """Of a run that lives, of one on another machine, and of something else."""
    mine = RunFolder(tmp_path)
    elsewhere = tmp_path / "scsdpo-run-elsewhere"
    foreign = tmp_path / "scsdpo-run-foreign"
    for folder in (elsewhere, foreign):
        folder.mkdir()
    (elsewhere / "owner").write_text(f"not-{socket.gethostname()}")
    RunFolder(tmp_path).close()
    assert {mine.path, elsewhere, foreign} == set(tmp_path.iterdir())
    with (mine.path / "owner").open("r+") as owner, pytest.raises(BlockingIOError):
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    mine.close()


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    assert 0 < _Quiet.timeout < 3600
    monkeypatch.setattr(_Quiet, "timeout", 0.2)
    delivery = Download()
    folder = delivery.open()
    (url,) = delivery.locations([folder / "x"])
    before = threading.active_count()
    address = ("127.0.0.1", urlsplit(url).port)
    with socket.create_connection(address, timeout=30) as idle:
        assert idle.recv(1) == b""  # closed by the other side
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    delivery.close()


def scope(path, key=None, kind="http"):
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return {"type": kind, "path": path, "headers": headers}


def status(guarded, asked):
    """What is answered; the app behind says 200."""
    said = []

    async def send(message):
        said.append(message)

    asyncio.run(guarded(asked, None, send))
    return said[0].get("status", said[0]["type"])


def test_who_has_no_key_gets_no_answer(monkeypatch):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    monkeypatch.setenv("VLLM_API_KEY", "right")
    guarded = RequireKey(app)
    for path in ("/collective_rpc", "/update_weights", "/inference/v1/generate", "/v1/models"):
        assert status(guarded, scope(path)) == 401
        assert status(guarded, scope(path, "wrong")) == 401
        assert status(guarded, scope(path, "right")) == 200
    assert status(guarded, scope("/health")) == 200
    assert status(guarded, scope("/v1/realtime", kind="websocket")) == "websocket.close"
    assert status(guarded, {"type": "lifespan"}) == 200
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ValueError, match="set the environment variable VLLM_API_KEY"):
        RequireKey(app)
