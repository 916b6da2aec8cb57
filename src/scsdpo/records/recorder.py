"""Names of logged figures, and observers of the next steps' tokens."""

from typing import Any, Protocol, cast

import lightning as L
from torch import Tensor

from scsdpo.loss import ObservedBlock, Observer, unobserved


class Recorder:
    """Keeps names of figures for callbacks that write them, and observers for the kernel."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._observers: list[Observer] = []

    def note(self, name: str) -> None:
        """Note that a figure was logged under `name`."""
        self._logged.add(name)

    @property
    def logged(self) -> frozenset[str]:
        """Names logged since the last record."""
        return frozenset(self._logged)

    def take_logged(self) -> set[str]:
        """Names logged since the last call."""
        logged, self._logged = self._logged, set()
        return logged

    def watch(self, observer: Observer) -> None:
        """Show the kernel's blocks of tokens to `observer` in the steps on the present batch.

        For `RolloutCallback.on_rollouts`. A block may repeat if memory ran out during a step.
        """
        self._observers.append(observer)

    def take_observer(self) -> Observer:
        """One observer that calls all those of `watch` since the last call."""
        observers, self._observers = self._observers, []

        def each(seen: ObservedBlock) -> None:
            for observer in observers:
                observer(seen)

        return each if observers else unobserved


class Recorded(Protocol):
    """The part of a `PolicyOptimizer` that callbacks use."""

    recorder: Recorder

    @property
    def batches(self) -> Tensor:
        """Number of batches of training questions since the run began; a batch may take no step."""

    def described(self) -> dict[str, Any]:
        """Description of the policy, and of sampling and judging in evaluations."""


def recorded(module: L.LightningModule) -> Recorded:
    """The module of a run, typed for callbacks that record it."""
    assert isinstance(vars(module).get("recorder"), Recorder), type(module)
    return cast(Recorded, module)
