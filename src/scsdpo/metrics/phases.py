"""Seconds and tokens of a step by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the time of each phase; inside another one, the inner phase's time is its own alone.

        with timer("student"):
            with timer("teacher"):
                ...

    On a GPU the marks are events in the stream, which the host does not wait for until `take`: work
    is counted where it is done, and not where it is asked for.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._open: list[str] = []
        self._tokens: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The time until the block's end belongs to `phase`."""
        self._open.append(phase)
        self._mark(phase)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    def _mark(self, phase: str) -> None:
        """From now on time belongs to `phase`; '': to none."""
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def count(self, phase: str, tokens: int) -> None:
        """Add tokens that went through `phase`."""
        self._tokens[phase] = self._tokens.get(phase, 0) + tokens

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and tokens by phase since the last time it was asked; forgets them."""
        seconds: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] = seconds.get(phase, 0.0) + _between(start, end)
        self._marks = [(self._open[-1], self._marks[-1][1])] if self._open else []
        tokens, self._tokens = self._tokens, {}
        return seconds, tokens


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000  # ms
    return end - start if isinstance(start, float) and isinstance(end, float) else 0.0
