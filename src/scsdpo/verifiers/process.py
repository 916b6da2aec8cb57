"""The owner's handle of a worker process."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from scsdpo.verifiers.own_time import OwnTime, WallTime
from scsdpo.verifiers.stage import MAX_MESSAGES, MAX_OPENING
from scsdpo.verifiers.verification import Verification
from scsdpo.verifiers.verify import MAX_ANSWER, MAX_ERROR

# Not `multiprocessing`: a fork beside torch's threads is unsafe, and its other start methods run
# the user's main program again.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from scsdpo.verifiers.worker import main; main(*json.loads(sys.argv[2]))"
)
END_SECONDS = 2.0
"""Seconds that a process gets to end a verifier's processes, before it is killed itself."""
_READ_BYTES = 1 << 20
_BYTES_A_CHARACTER = 12
"""Largest size of a character in JSON: two halves of a surrogate pair."""
_OTHER_CHARACTERS = 200
"""Largest size of a verdict's token, numbers and brackets."""


class Worker:
    """A process that judges one chunk of jobs at a time.

    `process` guards a child that judges, and ends the processes that the child leaves behind.

    Args:
        settings: limits on memory and length of feedback, which the process enforces.
        seconds: own time in which it must be ready.

    Raises:
        OSError: if the machine has no room for another process.
    """

    def __init__(self, settings: Verification, seconds: float) -> None:
        token = secrets.token_hex(16)
        kept = (token, settings.memory_mb, settings.max_feedback, settings.max_observation)
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(kept)]
        # In a session of its own: Ctrl-C is for the owner.
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
        self._own_time = OwnTime([self.process.pid], seconds)
        self._wall_time = WallTime([self.process.pid], seconds)
        self.time_left = self._own_time
        self.numbers: deque[int] = deque()
        """Jobs that it has not judged yet, in order."""
        self.started = self.prepared = False
        self._judge = self.process.pid
        self._token, self._rest = token.encode(), b""
        most = MAX_ANSWER + settings.max_feedback + MAX_ERROR + _OTHER_CHARACTERS
        most += max(MAX_OPENING, MAX_MESSAGES * (settings.max_observation + _OTHER_CHARACTERS))
        self._most_bytes = _BYTES_A_CHARACTER * most

    @property
    def idle(self) -> bool:
        """True if the process has started and has no job."""
        return self.started and not self.numbers

    def send(
        self, numbers: list[int], chunk: bytes, seconds: float, *, on_the_clock: bool = False
    ) -> None:
        """Send a chunk to an idle process.

        Args:
            numbers: of the jobs in the chunk.
            chunk: the jobs, pickled.
            seconds: time limit to prepare the verifiers.
            on_the_clock: deadlines are in wall-clock time, not in own time.
        """
        self.time_left = self._wall_time if on_the_clock else self._own_time
        self.numbers.extend(numbers)
        self.prepared = False
        self.time_left.restart(seconds)
        try:
            self.input.write(len(chunk).to_bytes(8, "big") + chunk)
            self.input.flush()
        except BrokenPipeError:  # it has died; the other pipe reports that
            return

    def ready(self, judge: int, seconds: float) -> None:
        """Note that it has started or, with jobs, prepared; a verdict is due in `seconds`."""
        self._judge = judge
        self.started, self.prepared = True, bool(self.numbers)
        self.time_left.restart(seconds)

    def judged(self, number: int, seconds: float) -> None:
        """Note that it has judged its first job; the next verdict is due in `seconds`."""
        first = self.numbers.popleft()
        assert first == number
        self.time_left.restart(seconds)

    def events(self) -> Iterator[list[Any]]:
        """The events that can be read without waiting; lines without the token are ignored.

        The last event of all is `["gone", how]`.
        """
        try:
            data = os.read(self.out, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            yield ["gone", f"its process died ({self._ending()})"]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(self._token):
                yield self._event(line.removeprefix(self._token))
            if not self.alive:
                return
        if len(self._rest) > self._most_bytes:
            yield ["gone", "it writes without end to the pipe of its verdicts"]

    def _event(self, line: bytes) -> list[Any]:
        try:
            event: list[Any] = json.loads(line)
        except ValueError:
            return ["gone", "something was written into the middle of its verdict"]
        return event

    def _ending(self) -> str:
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def resident(self) -> int:
        """Bytes of its resident memory; 0 if unknown (on other systems than Linux)."""
        try:
            pages = Path(f"/proc/{self._judge}/statm").read_text().split()[1]
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return int(pages) * os.sysconf("SC_PAGESIZE")

    @property
    def alive(self) -> bool:
        """True until its owner kills it."""
        return not self.input.closed

    def kill(self) -> None:
        """End the process and all processes that it started, and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with suppress(BrokenPipeError):  # input that it had not read yet
            self.input.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
