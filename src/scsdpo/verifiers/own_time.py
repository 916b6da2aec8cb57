"""How long processes had for their work: a deadline that does not run while they cannot."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LOOK_SECONDS = 0.1
"""Between two looks at processes that have not ended."""
_LONGEST = 4 * LOOK_SECONDS
"""Counted of the time between two looks: more has passed only if this very process was stopped, or
got no processor."""
_SHORTEST = LOOK_SECONDS / 2
_PATIENCE = 10
"""Times a deadline that processes are waited for which get no processor, or are stopped."""


class OwnTime:
    """Seconds left of a deadline, in the own time of some processes.

    Own time is wall-clock time without that in which nothing could be done: this process was
    stopped, or all were (SIGSTOP, a frozen or suspended machine), or the processes waited for a
    processor. One that sleeps or computes spends it. Processes that are held up for ten times their
    deadline are out of it, too. Where there is no /proc, only stops of this process are left out.

    Args:
        pids: the processes; what these have started counts with them.
        seconds: until the deadline.
    """

    def __init__(self, pids: list[int], seconds: float) -> None:
        self.pids = pids
        self._waited: dict[str, int] = {}
        self.restart(seconds)

    def restart(self, seconds: float) -> None:
        """Begin anew, with so many seconds."""
        self.left, self._most = seconds, _PATIENCE * seconds
        self._last = time.monotonic()

    def over(self) -> bool:
        """Whether the deadline has passed. Call it at least every `LOOK_SECONDS`."""
        now = time.monotonic()
        passed = now - self._last
        if passed >= min(_SHORTEST, self.left):
            self._last = now
            passed = min(passed, _LONGEST)
            self._most -= passed
            self.left -= passed - min(passed, self._held_up(passed))
        return min(self.left, self._most) <= 0

    def _held_up(self, passed: float) -> float:
        """Seconds since the last look in which one of the processes could not go on."""
        longest = 0.0
        seen: dict[str, int] = {}
        for thread in _threads(self.pids):
            with suppress(OSError, ValueError, IndexError):  # it has ended; no such file
                if (thread / "stat").read_text().rpartition(")")[2].split()[0] in "Tt":
                    return passed
                waited = seen[str(thread)] = int((thread / "schedstat").read_text().split()[1])
                longest = max(longest, (waited - self._waited.get(str(thread), waited)) / 1e9)
        self._waited = seen
        return longest


class WallTime(OwnTime):
    """Seconds left of a deadline on the clock, without those in which this process was stopped."""

    def _held_up(self, passed: float) -> float:
        return 0.0


def _threads(pids: list[int]) -> Iterator[Path]:
    """Those of the processes and of all that these have started."""
    for pid in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                yield thread
                children = (thread / "children").read_text().split()
                yield from _threads([int(child) for child in children])
