"""What a worker process of `VerifierPool` runs.

It reads pickled chunks of (prompt, response) from its standard input, each behind its length, and
writes one line of JSON an event: `["ready"]`, `["verdict", ...]`, `["broken", why]`.
The verifiers' own prints go to standard error.
"""

import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import BinaryIO

from scsdpo.prompt import Prompt
from scsdpo.verifiers.verify import contained, prepare_all

GRACE = 1.0
"""Seconds after the deadline at which the kernel ends a worker whose owner is gone."""


def main(deadline: float, memory_mb: int) -> None:
    """Judge until standard input closes."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    _limit_memory(memory_mb)
    # Left at its default, the alarm ends the process even inside a C function that never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    chunks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(source, chunks), daemon=True).start()

    def say(*event: object) -> None:
        sink.write(json.dumps(event) + "\n")
        sink.flush()

    say("ready")
    while True:
        try:
            jobs: list[tuple[int, Prompt, str]] = pickle.loads(chunks.get())
            prepare_all(prompt.verifier for _, prompt, _ in jobs)
        except Exception as error:
            say("broken", f"{error}")
            continue
        say("ready")
        for number, prompt, response in jobs:
            begin = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, deadline + GRACE)
            verdict = contained(prompt, response)
            signal.setitimer(signal.ITIMER_REAL, 0)
            taken = time.monotonic() - begin
            fields = (float(verdict.reward), verdict.answer, verdict.feedback, verdict.error)
            say("verdict", number, *fields, taken)


def _limit_memory(memory_mb: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = memory_mb << 20
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _receive(source: BinaryIO, chunks: "SimpleQueue[bytes]") -> None:
    """Queue chunks; the end of the pipe is the end of the owner, and so of this process."""
    while len(head := source.read(8)) == 8:
        chunks.put(source.read(int.from_bytes(head, "big")))
    os._exit(0)
