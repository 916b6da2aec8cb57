"""A deadline in the time that processes could run, which stands still while they cannot."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.1
"""Seconds between two looks at processes that have not ended."""
_LONGEST = 4 * LOOK_SECONDS
"""Most seconds counted between two looks: if more have passed, this process was stopped or had no
processor."""
_SHORTEST = LOOK_SECONDS / 2
_PATIENCE = 10
"""Multiple of the deadline after which processes without a processor, or stopped, are ended too."""


class OwnTime:
    """Seconds left of a deadline, in the own time of some processes.

    Own time is wall-clock time without the time in which the processes could not run: this process
    was stopped, or all were (SIGSTOP, a frozen or suspended machine), or the processes waited for a
    processor. Sleeping and computing count. Processes that are held up for ten times their
    deadline have no time left either. Without /proc only stops of this process are subtracted.

    Args:
        pids: the processes; their descendants count with them.
        seconds: until the deadline.
    """

    def __init__(self, pids: list[int], seconds: float) -> None:
        self.pids = pids
        self._waited: dict[str, int] = {}
        self.restart(seconds)

    def restart(self, seconds: float) -> None:
        """Start a new deadline of `seconds`."""
        self.left, self._most = seconds, _PATIENCE * seconds
        self._last = time.monotonic()

    def over(self) -> bool:
        """True if the deadline has passed. Call it at least every `LOOK_SECONDS`."""
        now = time.monotonic()
        passed = now - self._last
        if passed >= min(_SHORTEST, self.left):
            self._last = now
            passed = min(passed, _LONGEST)
            self._most -= passed
            self.left -= passed - min(passed, self._held_up(passed))
        return min(self.left, self._most) <= 0

    def _held_up(self, passed: float) -> float:
        """Seconds since the last look in which some process could not run."""
        longest = 0.0
        seen: dict[str, int] = {}
        for thread in _threads(self.pids):
            with suppress(OSError, ValueError, IndexError):  # it has ended, or there is no /proc
                if (thread / "stat").read_text().rpartition(")")[2].split()[0] in "Tt":
                    return passed
                waited = seen[str(thread)] = int((thread / "schedstat").read_text().split()[1])
                longest = max(longest, (waited - self._waited.get(str(thread), waited)) / 1e9)
        self._waited = seen
        return longest


class WallTime(OwnTime):
    """A wall-clock deadline that stands still while this process is stopped."""

    def _held_up(self, passed: float) -> float:
        return 0.0


def _threads(pids: list[int]) -> Iterator[Path]:
    """Threads (folders in /proc) of the processes and their descendants."""
    for pid in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                yield thread
                children = (thread / "children").read_text().split()
                yield from _threads([int(child) for child in children])
