"""Verifier that runs the tests of a program."""

import json
import logging
import math
import platform
import re
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers import landlock
from scsdpo.verifiers.seccomp import ARCHITECTURES, program

_READ_ANY_FILE = 1 << 2
"""CAP_DAC_READ_SEARCH: root's Python may stand in another user's folder."""
SANDBOX = Path(__file__).with_name("sandbox.py")
# Possessive, lest a long run of blanks be divided in every way.
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(?:python|py)?[ \t\r]*+$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"^[ \t]*+```[ \t\r]*+$", re.MULTILINE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PythonTests(Verifier):
    """Right iff the Python code of the response passes every test of `prompt.answer`.

    The code is the last closed ```python block. The tests are a JSON list of statements, such as
    `["assert add(1, 2) == 3"]`, run one after the other in the code's namespace until one fails;
    standard input is empty, and output is discarded.

    The code runs in a process of its own, with limits on CPU time, wall-clock time and memory, an
    empty environment and no descriptor but its own, and under a system call filter: the kernel lets
    it compute and read, and refuses the network, other programs and processes, signals, locks and
    every change of a file (`scsdpo.verifiers.seccomp`). Where the kernel has Landlock, it can open
    Python's own files alone (`scsdpo.verifiers.landlock`); where it has not, whatever the user can
    read, which is logged. It shares its process with the tests: a program that is written to
    deceive can make them pass. Linux on x86-64 or arm64 only.

    Args:
        seconds: wall-clock and CPU time of code and tests together. Keep it below
            `Verification(deadline=...)`.
        memory_mb: MiB of address space, Python itself (about 30) included.
        reveal: the feedback quotes the test that failed.
        strip_thinking: judge only what stands behind the thinking, as `Verifier` says; False: all
            of the response.

    Raises:
        ValueError: if a limit is too small, or the system has no such filter.
    """

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
        """Run an empty program, so that a system without the means is found at the start."""
        _check_system()

    def check(self, prompt: Prompt) -> None:
        """Whether it is a list of tests."""
        _tests(prompt.answer)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the code."""
        try:
            tests = _tests(prompt.answer)
        except ValueError as error:
            return Verdict(reward=0.0, error=str(error))
        code = last_code(response)
        if not code:
            feedback = "The response has no code between ```python and ```."
            return Verdict(reward=0.0, feedback=feedback)
        ends, timed_out = _run(code, tests, self.seconds, self.memory_mb)
        if len(ends) == len(tests) + 1 and ends[-1] is None:
            return Verdict(reward=1.0, answer=code)
        if not ends or ends[-1] is None:  # it came to no end
            late = f"it did not end within {self.seconds:g} s of time"
            why = late if timed_out else "the process ended: too much time or memory, or an exit"
            number = len(ends)
        else:
            why, number = ends[-1], len(ends) - 1
        return Verdict(reward=0.0, answer=code, feedback=self._feedback(tests, number, why))

    def _feedback(self, tests: list[str], number: int, why: str) -> str:
        if number == 0:
            return f"The code failed before any test: {why}"
        quoted = f" ({tests[number - 1]})" if self.reveal else ""
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


def _tests(answer: str) -> list[str]:
    try:
        tests = json.loads(answer)
    except (ValueError, RecursionError):
        tests = []
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise ValueError(
            "the gold answer of PythonTests must be a JSON list of statements, such as "
            '["assert add(1, 2) == 3"]'
        )
    return tests


def _run(
    code: str, tests: list[str], seconds: float, memory_mb: int
) -> tuple[list[str | None], bool]:
    """How code and tests came to their ends, as far as they did, and whether time ran out."""
    secret = secrets.token_hex(16)
    job = {
        "secret": secret,
        **_restrictions(),
        "code": code,
        "tests": tests,
        "cpu_seconds": math.ceil(seconds),
        "memory_mb": memory_mb,
    }
    command = [sys.executable, "-I", "-B", str(SANDBOX)]
    timed_out = False
    with tempfile.TemporaryFile() as report:
        try:
            subprocess.run(
                command,
                input=json.dumps(job).encode(),
                stdout=report,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            timed_out = True
        report.seek(0)
        lines = report.read().decode(errors="replace").split("\n")
    marked = [line.removeprefix(secret) for line in lines if line.startswith(f"{secret} ")]
    return [_end(line) for line in marked], timed_out


def _end(line: str) -> str | None:
    """What a line of the report says; code that has found the secret may write anything."""
    try:
        end = json.loads(line)
    except (ValueError, RecursionError):
        end = line
    return end if isinstance(end, str | None) else line


@cache
def _restrictions() -> dict[str, object]:
    """What the kernel is told to hold the code to."""
    interface = landlock.version()
    return {
        "filter": program(platform.machine()).hex(),
        "ruleset": landlock.ruleset(interface).hex() if interface else "",
        "readable": landlock.readable(),
        "capabilities": _READ_ANY_FILE,
    }


@cache
def _report_missing_layer() -> None:
    if sys.platform.startswith("linux") and not landlock.version():
        _log.warning(
            "PythonTests: this kernel has no Landlock, or has it switched off. The code that is "
            "judged can change and reach nothing, but it can read what this user can read: files, "
            "and, unless the user is root, the environment and the memory of the user's processes"
        )


@cache
def _check_system() -> None:
    if not sys.platform.startswith("linux") or platform.machine() not in ARCHITECTURES:
        raise ValueError(
            "PythonTests runs on Linux on x86-64 or arm64 only, for there it can shut code in"
        )
    ends, _ = _run("", [], 60.0, 1024)
    if ends != [None]:
        raise ValueError(
            "the kernel refuses the restrictions that PythonTests runs code under, a system call "
            "filter and, where it has it, Landlock; allow seccomp in this container"
        )
