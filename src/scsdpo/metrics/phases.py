"""Seconds and tokens of a training step by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("rollout", "verify", "teacher", "student", "step")
"""Phases of a training step, in order. The seconds of each are logged."""
MODEL_PHASES = ("rollout", "teacher", "student")
"""The phases that run a model. Their tokens are logged too."""


class PhaseTimer:
    """Adds up the time of each phase. A nested phase's time does not count for the outer one.

        with timer("student"):
            with timer("teacher"):
                ...

    On a GPU the marks are events in the stream, and the host waits for them in `take` alone. So
    the time of a phase is that of its kernels, and not that of their launch.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._open: list[str] = []
        self._tokens: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time until the block's end for `phase`."""
        self._open.append(phase)
        self._mark(phase)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    def _mark(self, phase: str) -> None:
        """Count the time from now on for `phase`; '': for none."""
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def count(self, phase: str, tokens: int) -> None:
        """Add to the tokens of `phase`."""
        self._tokens[phase] = self._tokens.get(phase, 0) + tokens

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and tokens of each phase since the last call, which starts both at 0 again."""
        seconds: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] = seconds.get(phase, 0.0) + _seconds_between(start, end)
        self._marks = [(self._open[-1], self._marks[-1][1])] if self._open else []
        tokens, self._tokens = self._tokens, {}
        return seconds, tokens


def _seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000  # ms
    return end - start if isinstance(start, float) and isinstance(end, float) else 0.0
