"""Numbers that change with the optimizer steps taken."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.contracts import declared
from scsdpo.state.stateful import Stateful


class Schedule(ABC):
    """A number as a function of the optimizer steps taken."""

    @abstractmethod
    def value(self) -> float:
        """The number now."""

    @declared
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value there will be."""


@dataclass(frozen=True)
class Constant(Schedule):
    """A number that does not change.

    Args:
        at: the number.
    """

    at: float

    def value(self) -> float:
        return self.at

    @property
    def bounds(self) -> tuple[float, float]:
        return self.at, self.at


class Ramp(Schedule, Stateful):
    """Linear from one number to another, then constant.

    value(n) = start + (end - start) min(n / steps, 1), n optimizer steps taken.

    Args:
        start: the value before the first step.
        end: the value from step `steps` on.
        steps: number of optimizer steps, >= 1.

    Raises:
        ValueError: if `steps` < 1.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"`Ramp(steps=...)` must be >= 1, got {steps}")
        self.start, self.end, self.steps = start, end, steps
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.taken: Tensor

    def value(self) -> float:
        return self.start + (self.end - self.start) * min(int(self.taken) / self.steps, 1.0)

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def after_step(self) -> None:
        self.taken += 1
