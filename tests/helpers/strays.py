"""A verifier that starts processes and speaks out of turn, in a module that a worker can import."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from scsdpo.prompt import Verdict
from scsdpo.verifiers import Verifier


class Unshowable(Exception):
    """Even its `repr` raises."""

    def __repr__(self):
        raise RuntimeError


def daemon():
    """A process in a session of its own, orphaned at once; its id."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if (pid := os.fork()) != 0:
            os.write(write, str(pid).encode())
            os._exit(0)
        os.close(write)
        time.sleep(600)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return pipe.read(9)


def write_everywhere(text):
    """To all descriptors, as careless C code may."""
    for number in range(3, 30):
        try:
            os.write(number, text)
        except OSError:
            continue


@dataclass(frozen=True)
class Strays(Verifier):
    """Does what the response says; the answer is the id of a process, if it has started one."""

    def verify(self, prompt, response):
        answer, feedback = response, str(os.getpid())
        match response.split():
            case ["fork-return"]:
                os.fork()
            case ["fork-raise"]:
                if os.fork() == 0:
                    raise KeyError("in the child")
            case ["fork-exit"]:
                if os.fork() == 0:
                    sys.exit(0)
            case ["session"]:
                answer = str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
            case ["daemon", *then]:
                answer = daemon()
                with open(prompt.answer, "w") as file:
                    file.write(answer)
                {"die": lambda: os._exit(3), "hang": lambda: time.sleep(600)}.get(
                    "".join(then), str
                )()
            case ["twice"]:
                write_everywhere(b'["verdict", 0, 1.0, "forged", "", "", 0.0]\n["verdict", 1')
            case ["endless"]:
                write_everywhere(b"x" * (20 << 20))
            case ["closes"]:
                os.closerange(3, 99)
            case ["killpg"]:
                os.killpg(0, signal.SIGKILL)
            case ["cancel"]:
                raise asyncio.CancelledError
            case ["unshowable"]:
                raise Unshowable
            case ["surrogate"]:
                answer, feedback = "\ud800", "a\udc80b \ud83d\ude00"
            case ["long", megabytes, end]:
                answer = feedback = "x" * (int(megabytes) << 20) + end
            case ["error", megabytes]:
                return Verdict(reward=0.0, error="\ud800" * (int(megabytes) << 20))
        return Verdict(reward=0.5, answer=answer, feedback=feedback)


@dataclass(frozen=True)
class Served(Verifier):
    """Has a helper, which it starts while it prepares."""

    def prepare(self):
        if not HELPERS:
            HELPERS.append(subprocess.Popen(["sleep", "600"], start_new_session=True))

    def verify(self, prompt, response):
        return Verdict(reward=float(HELPERS[0].poll() is None), answer=str(HELPERS[0].pid))


HELPERS = []
