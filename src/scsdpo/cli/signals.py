"""Handle signals from a command's start to its exit.

They replace Lightning's handlers, which broadcast, and Python's, which raise wherever the program
happens to be. The module imports nothing heavy, so that handlers are set before anything else.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from scsdpo import interrupt

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_WAIT_SECONDS = 10.0
"""Seconds that rank 0 waits for each launched rank to exit."""


def exit_code(signum: int) -> int:
    """130 after Ctrl-C (SIGINT); 143 after any other signal."""
    return 130 if signum == signal.SIGINT else 143


class Handlers:
    """A signal asks a run to stop; before the run, and at a second Ctrl-C, it ends the process."""

    launched: Callable[[], Sequence[subprocess.Popen[bytes]]] = staticmethod(lambda: ())
    """Processes of the ranks that this process has launched."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Handlers":
        for signum in SIGNALS:
            # `nohup` ignores SIGHUP, so that a run outlives its terminal: leave that.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        Handlers.launched = staticmethod(lambda: ())
        interrupt.reset()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker: its owner handles Ctrl-C
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self._interrupts += signum == signal.SIGINT
        name = signal.Signals(signum).name
        if interrupt.is_under_way() and self._interrupts < 2:
            interrupt.ask(signum)
            if not is_launched():
                _say(f"{name}: the run stops as soon as its state is saved")
        elif is_launched() and self._interrupts < 2:
            os.kill(os.getppid(), signum)  # rank 0 ends all
        else:
            _say(f"{name}: ended, nothing is saved")
            for process in self.launched():
                process.kill()
            os._exit(exit_code(signum))


def is_launched() -> bool:
    """True if rank 0 has started this rank."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def leave(stop: interrupt.Interrupted) -> int:
    """Exit code of a stopped run. Rank 0 waits for the ranks that it launched, whose code is 0."""
    for process in Handlers.launched():
        process.wait(_WAIT_SECONDS)
    return 0 if is_launched() else exit_code(stop.signum)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\nscsdpo: {text}\n".encode())
