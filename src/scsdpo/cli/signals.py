"""What signals do to a command, from its start to its exit.

They stand in for Lightning's handlers, which broadcast, and for Python's, which raise wherever the
program happens to be. Imports nothing heavy: it is there before anything else is.
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
"""For the launched ranks to leave."""


def exit_code(signum: int) -> int:
    """130 after Ctrl-C; 143 after whatever a scheduler or the end of a terminal sends."""
    return 130 if signum == signal.SIGINT else 143


class Handlers:
    """While a run is under way a signal asks it to stop; before, and the second Ctrl-C, end it."""

    launched: Callable[[], Sequence[subprocess.Popen[bytes]]] = staticmethod(lambda: ())
    """The ranks that this process has launched."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Handlers":
        for signum in SIGNALS:
            # `nohup` has said that the end of the terminal is nothing to a run.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        Handlers.launched = staticmethod(lambda: ())
        interrupt.reset()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker that was forked: Ctrl-C is for its owner
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self._interrupts += signum == signal.SIGINT
        name = signal.Signals(signum).name
        if interrupt.is_under_way() and self._interrupts < 2:
            interrupt.ask(signum)
            if not is_launched():
                _say(f"{name}: the run stops as soon as its state is whole")
        elif is_launched() and self._interrupts < 2:
            os.kill(os.getppid(), signum)  # rank 0 ends all
        else:
            _say(f"{name}: ended, nothing is saved")
            for process in self.launched():
                process.kill()
            os._exit(exit_code(signum))


def is_launched() -> bool:
    """Whether another rank has started this one."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def leave(stop: interrupt.Interrupted) -> int:
    """Exit code of a run that has stopped; rank 0 leaves last, and a launched rank in peace."""
    for process in Handlers.launched():
        process.wait(_WAIT_SECONDS)
    return 0 if is_launched() else exit_code(stop.signum)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be what has gone
        os.write(2, f"\nscsdpo: {text}\n".encode())
