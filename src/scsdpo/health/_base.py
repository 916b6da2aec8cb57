"""The contract of a rule, and the figures that it reads."""

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, variance


class Series:
    """A run's figures by name, in the order of its batches; a batch without a figure has no entry.

    `train/NAME` is kept as NAME, and `val/mean@K` as `val/mean`. A warm-up changes the policy on
    purpose, so the first value of `val/mean` is that of the last validation before training proper:
    a validation after batches of a warm-up replaces those before it.
    """

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = {}
        self._warmed_up = False
        """Batches of a warm-up came since the last validation."""

    def add(self, figures: Mapping[str, object]) -> None:
        """Add the figures of one batch or validation; figures that are not finite are left out."""
        self._warmed_up |= "warmup/examples" in figures
        for name, value in figures.items():
            if isinstance(value, int | float) and math.isfinite(value):
                kept = name.removeprefix("train/")
                if name.startswith("val/mean@"):
                    kept = "val/mean"
                    if self._warmed_up:
                        self._values.pop(kept, None)
                        self._warmed_up = False
                self._values.setdefault(kept, array("d")).append(value)

    def __getitem__(self, name: str) -> "array[float]":
        return self._values.get(name, array("d"))

    def last(self, name: str, count: int) -> float:
        """Mean of the last `count` values; nan if there are fewer."""
        values = self[name][-count:]
        return fmean(values) if len(values) == count else math.nan

    def first_and_last(self, name: str, count: int) -> tuple[float, float]:
        """Means of the first and of the last `count` values; nan if they would overlap."""
        values = self[name]
        if len(values) < 2 * count:
            return math.nan, math.nan
        return fmean(values[:count]), fmean(values[-count:])

    def fall(self, name: str, count: int) -> float:
        """Fall from the first to the last `count` values, in standard errors. Welch's t

        t = (m_1 - m_2) / sqrt((s_1^2 + s_2^2) / count); nan if they would overlap.
        """
        first, last = self.first_and_last(name, count)
        if math.isnan(first):
            return math.nan
        values = self[name]
        error = math.sqrt((variance(values[:count]) + variance(values[-count:])) / count)
        return (first - last) / max(error, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A warning that a rule gives."""

    message: str
    """The warning, with its numbers."""
    values: dict[str, float]
    """The numbers that were compared, with the thresholds."""


class Rule(ABC):
    """Checks a run's figures after each batch. It warns once in a run, under its class's name.

    A rule has no state: its finding depends on the figures alone, so that recorded figures can be
    checked afterwards.
    """

    remedy: str
    """Advice to the user."""

    @abstractmethod
    def look(self, past: Series) -> Finding | None:
        """The finding; None: nothing is wrong, or there are too few figures."""
