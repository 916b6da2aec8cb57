"""Real vLLM servers as processes of their own, started, stopped and stalled."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scsdpo.policy import TINY_FOLDER
from scsdpo.rollout.servers.server import Server, Unreachable

KEY = "a key that both sides know"

FLAGS = (
    "--worker-extension-cls=scsdpo.rollout.WeightReceiver",
    "--logprobs-mode=processed_logprobs",
    "--enable-scale-out",
    "--middleware=scsdpo.rollout.RequireKey",
    # For the CPU:
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    "--max-num-batched-tokens=8192",  # on CPU a seeded prompt that is read in parts ends vLLM
)


def wait_for(condition):
    """However long it takes, within reason."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(Unreachable):
            if condition():
                return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


class Running:
    """A server of the shipped policy; it and its workers are one process group."""

    def __init__(self, folder: Path, *flags: str, model: Path = TINY_FOLDER, **environment: str):
        self.flags, self.model, self.environment = flags, model, environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *FLAGS, *self.flags]
        where = [f"--model={self.model}", "--host=127.0.0.1", f"--port={self.port}"]
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # to nodes, of which two workers need two
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_API_KEY": KEY,
            **self.environment,
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *where],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> "Running":
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    @property
    def version(self) -> str:
        return asyncio.run(Server(self.url).version())

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(30)


@contextmanager
def all_running(*started: Running) -> Iterator[list[Running]]:
    """Servers that answer; all are gone at the end, also if one does not start."""
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()
