"""The program of a worker process of `VerifierPool`.

It reads pickled chunks of (prompt, response), or (prompt, turn of an episode), from its standard
input, each preceded by its length, and writes one line an event: a token, which distinguishes its
lines from anything that a verifier writes to the pipe, and JSON: `["ready", pid]`,
`["verdict", ...]`, `["turn", ...]`, `["no room", ...]`, `["broken", why]`. The verifiers' own
prints go to standard error.

Processes that a verifier starts while it prepares may stay. Those it starts for a verdict are ended
before the verdict is sent, and those of an environment end with its episode. The parent process
(`guarded`) ends the rest.
"""

import json
import os
import pickle
import resource
import sys
import threading
import time
from dataclasses import asdict
from queue import SimpleQueue
from typing import BinaryIO

from scsdpo.io import streams
from scsdpo.prompt import Prompt
from scsdpo.verifiers.guard import children, end_children, guarded
from scsdpo.verifiers.stage import Stage, Turn
from scsdpo.verifiers.text import capped
from scsdpo.verifiers.verify import NoRoom, contained, prepare_all


def main(token: str, memory_mb: int, max_feedback: int, max_observation: int) -> None:
    """Judge until standard input closes."""
    guarded()
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    streams.guard()  # a verifier's prints may have no reader any more
    sys.stdout = sys.stderr
    _limit_memory(memory_mb)
    chunks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(source, chunks), daemon=True).start()

    def say(*event: object) -> None:
        sink.write(f"\n{token}{json.dumps(event)}\n")
        sink.flush()

    stage = Stage(max_feedback, max_observation, alone=True)
    say("ready", os.getpid())
    while True:
        try:
            jobs: list[tuple[int, Prompt, str | Turn]] = pickle.loads(chunks.get())
            prepare_all(prompt.verifier for _, prompt, _ in jobs)
        except Exception as error:
            say("broken", capped(f"{error}", max_feedback))
            continue
        kept = children()
        say("ready", os.getpid())
        for number, prompt, job in jobs:
            begin = time.monotonic()
            if isinstance(job, Turn):
                kind = "turn"
                try:
                    answer = stage.answer(prompt, job)
                except NoRoom as fault:
                    kind, answer = "no room", fault.verdict
                say(kind, number, asdict(answer), time.monotonic() - begin)
                continue
            kind = "verdict"
            try:
                verdict = contained(prompt, job, max_feedback)
            except NoRoom as fault:
                kind, verdict = "no room", fault.verdict
            end_children(kept)
            taken = time.monotonic() - begin
            fields = (verdict.reward, verdict.answer, verdict.feedback, verdict.error)
            say(kind, number, *fields, taken)


def _limit_memory(memory_mb: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = memory_mb << 20
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _receive(source: BinaryIO, chunks: "SimpleQueue[bytes]") -> None:
    """Queue chunks. When the pipe ends, the owner has ended, and this process exits."""
    while len(head := source.read(8)) == 8:
        chunks.put(source.read(int.from_bytes(head, "big")))
    os._exit(0)
