"""What was logged since the last record, and who looks at the tokens of the next steps."""

from typing import Any, Protocol, cast

import lightning as L
from torch import Tensor

from scsdpo.loss import ObservedBlock, Observer, unobserved


class Recorder:
    """Keeps names of figures for the callbacks that write them, and observers for the kernel."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._observers: list[Observer] = []

    def note(self, name: str) -> None:
        """A figure was logged under `name`."""
        self._logged.add(name)

    @property
    def logged(self) -> frozenset[str]:
        """Names logged since the last record."""
        return frozenset(self._logged)

    def take_logged(self) -> set[str]:
        """Names logged since the last time it was asked."""
        logged, self._logged = self._logged, set()
        return logged

    def watch(self, observer: Observer) -> None:
        """Show the kernel's blocks of tokens to `observer` in the steps on the batch at hand.

        For `RolloutCallback.on_rollouts`. A block may come again if memory ran out amid a step.
        """
        self._observers.append(observer)

    def take_observer(self) -> Observer:
        """All that were asked for since the last time, as one."""
        observers, self._observers = self._observers, []

        def each(seen: ObservedBlock) -> None:
            for observer in observers:
                observer(seen)

        return each if observers else unobserved


class Recorded(Protocol):
    """A `PolicyOptimizer`, as callbacks know it."""

    recorder: Recorder

    @property
    def batches(self) -> Tensor:
        """Batches of training questions since the run began; not steps: a batch may take none."""

    def described(self) -> dict[str, Any]:
        """The policy, and how it is asked and judged in evaluations."""


def recorded(module: L.LightningModule) -> Recorded:
    """The module of a run, for callbacks that keep records of it."""
    assert isinstance(vars(module).get("recorder"), Recorder), type(module)
    return cast(Recorded, module)
