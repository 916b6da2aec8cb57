"""Verifiers of tests, in a module that a worker process imports in no time."""

import os
import sys
import time
import zlib
from dataclasses import dataclass

from scsdpo.prompt import Verdict
from scsdpo.verifiers import Verifier


@dataclass(frozen=True)
class Coin(Verifier):
    """About half of all texts pass."""

    def verify(self, prompt, response):
        return Verdict(reward=float(zlib.crc32(response.encode()) % 2), answer=response[:1])


@dataclass(frozen=True)
class Always(Verifier):
    """One verdict for everything."""

    reward: float = 1.0

    def verify(self, prompt, response):
        return Verdict(reward=self.reward)


@dataclass(frozen=True)
class Unruly(Verifier):
    """Does what the response says."""

    def verify(self, prompt, response):
        match response.split():
            case ["raise"]:
                raise KeyError("oops")
            case ["exit"]:
                sys.exit(3)
            case ["die"]:
                os._exit(3)
            case ["hang"]:
                time.sleep(3600)
            case ["spin"]:  # inside one call of C code that holds the interpreter's lock
                sum(range(10**15))
            case ["fork"]:  # leaves a child behind, and hangs
                if os.fork() == 0:
                    time.sleep(3600)
                time.sleep(3600)
            case ["allocate"]:
                return Verdict(reward=float(len(b"x" * (1 << 40))))
            case ["leak", mebibytes]:
                LEAK.append(b"x" * (int(mebibytes) << 20))
            case ["print"]:
                print('["verdict", 0, 1.0, null, "", "", 0.0]')
                os.write(1, b"\n[\n")
            case ["none"]:
                return None
            case ["nan"]:
                return Verdict(reward=float("nan"))
            case ["text"]:
                return Verdict(reward="1")
            case ["answer"]:
                return Verdict(reward=1.0, answer=7)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
        return Verdict(reward=0.5, answer=response, feedback=str(os.getpid()))


LEAK = []


@dataclass(frozen=True)
class Unprepared(Verifier):
    """Cannot work at all."""

    def prepare(self):
        raise ValueError("the library is missing; install it")

    def verify(self, prompt, response):
        raise AssertionError


@dataclass(frozen=True)
class Unready(Verifier):
    """Fails on every response."""

    def verify(self, prompt, response):
        raise OSError("no licence")
