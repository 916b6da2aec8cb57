"""A LightningModule that knows what it logged for a batch."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from scsdpo.loss import Observation, Observer, unobserved


class Recorded(L.LightningModule):
    """Counts the batches asked, and keeps the names of what was logged since the last record."""

    batches: Tensor
    """Of training questions since the run began; not steps, for a batch may take none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._logged: set[str] = set()
        self._observers: list[Observer] = []

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, and the name is remembered."""
        super().log(name, value, *args, **kwargs)
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

        def each(seen: Observation) -> None:
            for observer in observers:
                observer(seen)

        return each if observers else unobserved

    def described(self) -> dict[str, Any]:
        """What records say of the policy and of how it is asked."""
        return {}
