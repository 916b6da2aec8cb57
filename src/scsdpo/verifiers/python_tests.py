"""Verifier that runs the tests of a program."""

import json
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
from scsdpo.verifiers.seccomp import ARCHITECTURES, program

SANDBOX = Path(__file__).with_name("sandbox.py")
# Possessive, lest a long run of blanks be divided in every way.
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(?:python|py)?[ \t\r]*+$", re.MULTILINE | re.IGNORECASE)
_END = re.compile(r"^[ \t]*+```[ \t\r]*+$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class PythonTests(Verifier):
    """Right iff the Python code of the response passes every test of `prompt.answer`.

    The code is the last closed ```python block. The tests are a JSON list of statements, such as
    `["assert add(1, 2) == 3"]`, run one after the other in the code's namespace until one fails;
    standard input is empty, and output is discarded.

    The code runs in a process of its own, with limits on CPU time, wall-clock time and memory, and
    under a system call filter: the kernel refuses it the network, other programs and processes,
    signals, and every change of a file (`scsdpo.verifiers.seccomp`). It can read what the user can
    read. It shares its process with the tests: a program that is written to deceive can make them
    pass. Linux on x86-64 or arm64 only.

    Args:
        seconds: wall-clock and CPU time of code and tests together. Keep it below
            `Verification(deadline=...)`.
        memory_mb: MiB of address space, Python itself (about 30) included.
        reveal: the feedback quotes the test that failed.

    Raises:
        ValueError: if a limit is too small, or the system has no such filter.
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    reveal: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"`PythonTests(seconds=...)` must be > 0, got {self.seconds}")
        if self.memory_mb < 64:
            raise ValueError(f"`PythonTests(memory_mb=...)` must be >= 64, got {self.memory_mb}")

    def prepare(self) -> None:
        """Run an empty program, so that a system without the means is found at the start."""
        _check_system()

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
        "filter": program(platform.machine()).hex(),
        "code": code,
        "tests": tests,
        "cpu_seconds": math.ceil(seconds),
        "memory_mb": memory_mb,
    }
    command = [sys.executable, "-I", "-B", str(SANDBOX)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    timed_out = False
    with tempfile.TemporaryFile() as report:
        try:
            subprocess.run(
                command,
                input=json.dumps(job).encode(),
                stdout=report,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            timed_out = True
        report.seek(0)
        lines = report.read().decode(errors="replace").split("\n")
    marked = [line.removeprefix(secret) for line in lines if line.startswith(f"{secret} ")]
    return [json.loads(line) for line in marked], timed_out


@cache
def _check_system() -> None:
    if not sys.platform.startswith("linux") or platform.machine() not in ARCHITECTURES:
        raise ValueError(
            "PythonTests runs on Linux on x86-64 or arm64 only, for there it can shut code in"
        )
    ends, _ = _run("", [], 60.0, 1024)
    if ends != [None]:
        raise ValueError(
            "the kernel refuses the system call filter that PythonTests shuts code in with; allow "
            "seccomp in this container"
        )
