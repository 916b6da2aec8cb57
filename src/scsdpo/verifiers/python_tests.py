"""A verifier that runs tests on the response's program."""

import array
import atexit
import errno
import fcntl
import json
import logging
import math
import os
import platform
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers import landlock, seccomp
from scsdpo.verifiers.own_time import LOOK_SECONDS, OwnTime
from scsdpo.verifiers.remote import subjects
from scsdpo.verifiers.verify import NO_ROOM

_READ_ANY_FILE = 1 << 2
"""CAP_DAC_READ_SEARCH: root's Python may be in another user's folder."""
SANDBOX = Path(__file__).with_name("sandbox.py")
THREADS = 64
"""Threads that a response may have at a time, up to a few that start at the same moment."""
_REFUSALS = 1000
"""Number of refused threads after which a response is ended: each refusal takes time."""
_PAUSES = (0.05, 0.2, 0.5)
"""Seconds before each further attempt, if the machine had no room for the processes."""
_PREPARATIONS = 20
"""Number of such rounds of attempts before the first verdict."""
_REPORT_BYTES = 1 << 20
# Possessive quantifiers, so that long runs of blanks take linear time.
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(?:python|py)?[ \t\r]*+$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"^[ \t]*+```[ \t\r]*+$", re.MULTILINE)

_log = logging.getLogger(__name__)

Test = str | dict[str, str]
"""Statements, or the input of a program and its expected output."""


@dataclass(frozen=True, kw_only=True)
class PythonTests(Verifier):
    """Right iff the Python code of the response passes every test of `prompt.answer`.

    The code is the last closed ```python block. The tests are a JSON list and run in order until
    one fails. They are statements, such as `["assert add(1, 2) == 3"]`, which use the code's names;
    or `{"input": ..., "output": ...}`: the code runs as a program that reads the input from
    `sys.stdin` and must print the output. Blanks at the ends of lines and of the text are ignored.

    The code and the tests run in two processes. A call in a test sends its arguments to the code's
    process, which returns the function's result as plain data: numbers, text, containers, numpy
    arrays. Any other result stays there as an object whose attributes, items and methods can be
    used, and which equals nothing. The tests compare values in their own process. So expected
    values never enter the code's process, and the code cannot change the comparison
    (`scsdpo.verifiers.remote`).

    Both processes have limits on CPU time, wall-clock time, memory and threads, an empty
    environment, no descriptors but their own, and a system call filter: the kernel lets them
    compute and read, and refuses the network, other programs and processes, signals, locks and
    every change of a file (`scsdpo.verifiers.seccomp`). If the kernel has Landlock, they can open
    Python's own files only (`scsdpo.verifiers.landlock`); otherwise all files that the user can
    read, which is logged. Linux on x86-64 or arm64 only.

    Args:
        seconds: limit on the own time (`scsdpo.verifiers.own_time`) of code and tests together, and
            on the CPU time of each. Keep it below `Verification(deadline=...)`.
        memory_mb: limit on the address space of each process in MiB, with Python's own 30 or so.
        reveal: the feedback quotes the test that failed.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Raises:
        ValueError: if a limit is too small, or the system has no such filter.
    """

    reads_json: ClassVar[bool] = True
    seconds: float = 5.0
    memory_mb: int = 1024
    reveal: bool = False
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"`PythonTests(seconds=...)` must be > 0, got {self.seconds}")
        if self.memory_mb < 64:
            raise ValueError(f"`PythonTests(memory_mb=...)` must be >= 64, got {self.memory_mb}")
        _report_missing_layer()

    def prepare(self) -> None:
        """Run an empty program, so that an unsuitable system is reported at the start."""
        _check_system()
        _starter()  # started here, because processes of a verdict end with the verdict

    def check(self, prompt: Prompt) -> None:
        """Raise if the answer is no list of tests, or they cannot be separated from the code."""
        _tests(prompt.answer)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the code."""
        try:
            tests, *_ = _tests(prompt.answer)
        except ValueError as error:
            return Verdict(reward=0.0, error=str(error))
        code = last_code(response)
        if not code:
            feedback = "The response has no code between ```python and ```."
            return Verdict(reward=0.0, feedback=feedback)
        ends, timed_out = _run(code, prompt.answer, self.seconds, self.memory_mb)
        if len(ends) == len(tests) + 1 and ends[-1] is None:
            return Verdict(reward=1.0, answer=code)
        if not ends or ends[-1] is None:  # the run was cut off
            late = f"it did not end within {self.seconds:g} s of time"
            why = late if timed_out else "the process ended: too much time or memory, or an exit"
            number = len(ends)
        else:
            why, number = ends[-1], len(ends) - 1
        return Verdict(reward=0.0, answer=code, feedback=self._feedback(tests, number, why))

    def _feedback(self, tests: list[Test], number: int, why: str) -> str:
        if number == 0:
            return f"The code failed before any test: {why}"
        test = tests[number - 1]
        shown = test if isinstance(test, str) else f"input {test['input']!r}"
        quoted = f" ({shown})" if self.reveal else ""
        return f"Test {number} of {len(tests)} failed{quoted}: {why}"


def last_code(response: str) -> str:
    """The text of the last closed block of Python; empty if there is none. Takes linear time."""
    code, position = "", 0
    while start := _FENCE.search(response, position):
        end = _END.search(response, start.end())
        if end is None:
            break
        code, position = response[start.end() : end.start()].strip("\n"), end.end()
    return code


@lru_cache(maxsize=1024)
def _tests(answer: str) -> tuple[list[Test], list[str], dict[str, tuple[str, str]], list[str]]:
    """The tests, and the result of `subjects` for them."""
    try:
        tests = json.loads(answer)
    except (ValueError, RecursionError):
        tests = []
    if not isinstance(tests, list) or not tests or not all(map(_is_test, tests)):
        raise ValueError(
            "the gold answer of PythonTests must be a JSON list of statements, such as "
            '["assert add(1, 2) == 3"], or of {"input": ..., "output": ...}'
        )
    return tests, *subjects([test for test in tests if isinstance(test, str)])


def _is_test(test: object) -> bool:
    return isinstance(test, str) or (
        isinstance(test, dict)
        and test.keys() == {"input", "output"}
        and all(isinstance(text, str) for text in test.values())
    )


def _run(code: str, answer: str, seconds: float, memory_mb: int) -> tuple[list[str | None], bool]:
    """Failures of the code and of each finished test (None: passed), and whether time ran out.

    Raises:
        OSError: if the machine had no room for the processes in several attempts.
    """
    tests, own, libraries, cases = _tests(answer)
    names = {"own": own, "libraries": libraries, "cases": cases}
    job = json.dumps({"code": code, "tests": tests, **names})
    begin = time.monotonic()
    for pause in (*_PAUSES, None):
        attempt = _Attempt(seconds, memory_mb)
        try:
            ends, timed_out = attempt.run(job.encode())
        except OSError as error:
            fault = error
        else:
            # The code may raise that error itself: it counts only if threads cannot start now.
            if not attempt.short_of_threads(ends) or (pause is None and _can_start_thread()):
                return ends, timed_out
            fault = OSError(errno.EAGAIN, "no thread could be started")
        if pause is None or time.monotonic() - begin > seconds:
            raise OSError(
                fault.errno,
                f"the machine had no room for the processes that judge ({fault}); lower "
                "model.verification.workers, or raise the limits on processes and memory",
            ) from fault
        time.sleep(min(pause, seconds))
    raise AssertionError


def _can_start_thread() -> bool:
    thread = threading.Thread(target=int)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return True


class _Attempt:
    """One run of a job in two fresh processes.

    Args:
        seconds: limit on its own time.
        memory_mb: limit of each process, in MiB.
    """

    def __init__(self, seconds: float, memory_mb: int) -> None:
        self._seconds, self._memory_mb = seconds, memory_mb
        self._descriptors: set[int] = set()
        self._report = b""
        self._granted = self._refused = 0

    def run(self, job: bytes) -> tuple[list[str | None], bool]:
        """Run the job; returns the same as `_run`.

        Raises:
            OSError: if the processes did not start, or another program killed one.
        """
        request = {
            **_restrictions(),
            "cpu_seconds": math.ceil(self._seconds),
            "memory_mb": self._memory_mb,
        }
        with _ONE_AT_A_TIME:
            starter = _starter()
            try:
                theirs, to_tests = self._opened(os.pipe())
                from_tests, report = self._opened(os.pipe())
                counter, their_counter = socket.socketpair()
                with counter:
                    with their_counter:
                        given = [theirs, report, their_counter.fileno()]
                        pids = starter.ask(request, given)
                    self._close(theirs)
                    self._close(report)
                    if isinstance(pids, list):
                        time_left = OwnTime(pids, self._seconds)
                        timed_out = self._attend(time_left, job, to_tests, from_tests, counter)
                        endings = starter.ask({}, [])
            except BaseException:
                starter.close()  # ends all processes that it has started
                raise
            finally:
                for descriptor in list(self._descriptors):
                    self._close(descriptor)
        if not isinstance(pids, list):
            raise OSError(pids, os.strerror(pids))
        started, *ends = [_end(line) for line in self._report.split(b"\n")[:-1]] or ["no"]
        if started is not None:
            raise OSError("they did not start")
        if not timed_out and (not ends or ends[-1] is not None):
            for ending in endings:
                if ending and _killed(ending[0]) and ending[1] < math.ceil(self._seconds):
                    raise OSError(errno.ENOMEM, "one was killed, most likely for want of memory")
        return ends, timed_out

    def short_of_threads(self, ends: list[str | None]) -> bool:
        """True if threads were granted to the code, and it reports that none could be started."""
        said = "start new thread" in (ends[-1] or "") if ends else False
        return said and self._granted > 0 and not self._refused

    def _opened(self, descriptors: tuple[int, int]) -> tuple[int, int]:
        self._descriptors.update(descriptors)
        return descriptors

    def _close(self, descriptor: int) -> None:
        self._descriptors.remove(descriptor)
        os.close(descriptor)

    def _attend(
        self, time_left: OwnTime, job: bytes, to_tests: int, from_tests: int, counter: socket.socket
    ) -> bool:
        """Send the job, grant threads, and read the report to its end; True if time ran out."""
        os.set_blocking(to_tests, False)
        poll = select.poll()
        poll.register(to_tests, select.POLLOUT)
        poll.register(from_tests, select.POLLIN)
        poll.register(counter, select.POLLIN)
        while not time_left.over():
            wait = min(LOOK_SECONDS, max(time_left.left, 0.001))
            for descriptor, _ in poll.poll(math.ceil(1000 * wait)):
                if descriptor == from_tests:
                    data = os.read(from_tests, 1 << 16)
                    self._report += data
                    if not data or len(self._report) > _REPORT_BYTES:
                        return False
                elif descriptor == to_tests:
                    try:
                        job = job[os.write(to_tests, job) :]
                    except BrokenPipeError:  # the report will show it
                        job = b""
                    if not job:
                        poll.unregister(to_tests)
                        self._close(to_tests)
                elif descriptor == counter.fileno():
                    _, given, _, _ = socket.recv_fds(counter, 1, 1)
                    poll.unregister(counter)
                    for listener in given:
                        self._descriptors.add(listener)
                        poll.register(listener, select.POLLIN)
                elif not self._grant(descriptor, time_left.pids[0]):
                    self._report += b'"it starts threads without end"\n'
                    return False
        return True

    def _grant(self, listener: int, response: int) -> bool:
        """Answer requests for threads; False if the response asks without end."""
        question = array.array("B", bytes(_QUESTION_BYTES))
        try:
            fcntl.ioctl(listener, _RECEIVE, question)
            stat = Path(f"/proc/{response}/stat").read_text().rpartition(")")[2].split()
            granted = int(stat[_THREADS_FIELD]) < THREADS
            (number,) = struct.unpack_from("=Q", question)
            try:
                flags = _GO_ON if granted else 0
                error = 0 if granted else -errno.EAGAIN
                fcntl.ioctl(listener, _ANSWER, struct.pack("=QqiI", number, 0, error, flags))
            except OSError as why:
                if why.errno != errno.EINVAL:
                    raise
                # Linux before 5.5 cannot let a call go on.
                refusal = struct.pack("=QqiI", number, 0, -errno.EAGAIN, 0)
                fcntl.ioctl(listener, _ANSWER, refusal)
                granted = False
        except OSError:  # the process has ended; the report will show it
            return True
        self._granted += granted
        self._refused += not granted
        return self._refused < _REFUSALS


_ONE_AT_A_TIME = threading.Lock()
# Seccomp's notifications: requests of ioctl, the size of a question, and an answer's flag.
_RECEIVE, _ANSWER, _QUESTION_BYTES, _GO_ON = 0xC0502100, 0xC0182101, 80, 1
_THREADS_FIELD = 17
"""Index of the number of threads in /proc/PID/stat, after the name."""


def _killed(status: float) -> bool:
    return os.WIFSIGNALED(int(status)) and os.WTERMSIG(int(status)) == signal.SIGKILL


def _end(line: bytes) -> str | None:
    """The failure that a line of the report states; None: it states none."""
    try:
        end = json.loads(line)
    except (ValueError, RecursionError):
        end = line.decode(errors="replace")
    return end if isinstance(end, str | None) else repr(end)


class _Starter:
    """The process that starts the processes of responses and tests; it ends with this process."""

    def __init__(self) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(SANDBOX)],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )

    def ask(self, request: dict[str, object], descriptors: list[int]) -> Any:
        """Its answer to a request; raises OSError if it has ended."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        answer = self._socket.recv(1 << 12)
        if not answer:
            raise OSError("the process that starts others has ended")
        return json.loads(answer)

    @property
    def alive(self) -> bool:
        """True if it was not closed and has not ended."""
        return self._socket.fileno() >= 0 and self._process.poll() is None

    def close(self) -> None:
        """End it and all processes that it has started."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


_starters: dict[int, _Starter] = {}


def _starter() -> _Starter:
    """The starter of this process; a forked copy of this process needs its own."""
    starter = _starters.get(os.getpid())
    if starter is None or not starter.alive:
        starter = _starters[os.getpid()] = _Starter()
        atexit.register(starter.close)
    return starter


@cache
def _restrictions() -> dict[str, object]:
    """The restrictions that the kernel enforces on the code."""
    interface = landlock.version()
    machine = platform.machine()
    return {
        "filter": seccomp.program(machine).hex(),
        "asking": seccomp.threads(machine, asking=True).hex(),
        "refusing": seccomp.threads(machine, asking=False).hex(),
        "ruleset": landlock.ruleset(interface).hex() if interface else "",
        "readable": landlock.readable(),
        "capabilities": _READ_ANY_FILE,
        # Without Landlock, a user namespace denies the memory of the user's other processes.
        "own_users": not interface and os.geteuid() != 0,
    }


@cache
def _report_missing_layer() -> None:
    if sys.platform.startswith("linux") and not landlock.version():
        _log.warning(
            "PythonTests: this kernel has no Landlock, or it is switched off. The judged code can "
            "change and reach nothing, but it can read what this user can read: files and, unless "
            "the user is root or may create namespaces, the environment and the memory of the "
            "user's processes, which hold the tests"
        )


@cache
def _check_system() -> None:
    if not sys.platform.startswith("linux") or platform.machine() not in seccomp.ARCHITECTURES:
        raise ValueError(
            "PythonTests runs only on Linux on x86-64 or arm64, where it can isolate code"
        )
    ends: list[str | None] = []
    for _ in range(_PREPARATIONS):
        try:
            ends, _ = _run("", '["pass"]', 60.0, 1024)
        except OSError as error:
            ends = [str(error)]
            if error.errno in NO_ROOM:
                continue
        break
    if ends != [None, None]:
        raise ValueError(
            "PythonTests runs code under a system call filter (seccomp) and, if the kernel has it, "
            f"Landlock. The kernel refuses this ({ends}): allow seccomp in this container"
        )
