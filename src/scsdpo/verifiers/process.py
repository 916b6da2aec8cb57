"""A worker process, as its owner sees it."""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# Not `multiprocessing`: to fork beside torch's threads is unsafe, and its other ways of starting
# run the user's program once more.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from scsdpo.verifiers.worker import main; main(float(sys.argv[2]), int(sys.argv[3]))"
)


class Worker:
    """A process that judges one chunk of jobs at a time.

    Args:
        deadline: seconds a verdict may take, as the process itself keeps it.
        memory_mb: MiB that it may hold.
        limit: until when it must be ready, in seconds of the monotonic clock.
    """

    def __init__(self, deadline: float, memory_mb: int, limit: float) -> None:
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(deadline), str(memory_mb)]
        # In a session of its own: Ctrl-C is for the owner, and what it started dies with it.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.out = self.process.stdin, self.process.stdout.fileno()
        os.set_blocking(self.out, False)
        self.limit = limit
        self.numbers: deque[int] = deque()
        """Jobs that it has and has not judged yet, in order."""
        self.started = self.prepared = False
        self._rest = b""

    @property
    def idle(self) -> bool:
        """Started, and without a job."""
        return self.started and not self.numbers

    def send(self, numbers: list[int], chunk: bytes, limit: float) -> None:
        """Give an idle process a chunk; it must have prepared its verifiers by `limit`."""
        self.numbers.extend(numbers)
        self.prepared, self.limit = False, limit
        try:
            self.input.write(len(chunk).to_bytes(8, "big") + chunk)
            self.input.flush()
        except BrokenPipeError:  # it died since; its end of the other pipe says so
            return

    def ready(self, limit: float) -> None:
        """It has started or, with jobs, prepared; the first verdict is due at `limit`."""
        self.started, self.prepared, self.limit = True, bool(self.numbers), limit

    def judged(self, number: int, limit: float) -> None:
        """It has judged the first of its jobs; the next verdict is due at `limit`."""
        first = self.numbers.popleft()
        assert first == number
        self.limit = limit

    def events(self) -> Iterator[list[Any]]:
        """What it has said; the last event of all is `["gone", how]`."""
        while True:
            try:
                data = os.read(self.out, 1 << 20)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
                if not self.alive:
                    return
            if not data:
                yield ["gone", _ending(self.process.wait())]
                return

    def resident(self) -> int:
        """Bytes of memory that it holds; 0 where the system does not say (other than Linux)."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return int(pages) * os.sysconf("SC_PAGESIZE")

    @property
    def alive(self) -> bool:
        """Not killed by its owner."""
        return not self.input.closed

    def kill(self) -> None:
        """End the process and all that it started; it leaves no zombie."""
        with suppress(ProcessLookupError, PermissionError):  # gone; macOS: a zombie
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(BrokenPipeError):  # what it had not read yet
            self.input.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
