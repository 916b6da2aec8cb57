"""From values to places: the ticks and the scale of one axis."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """Values low..high onto places start..end, in pixels; `log`: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is; one beyond an end stays at it."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        share = (min(max(value, low), high) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def ticks(low: float, high: float, about: int, *, log: bool = False) -> list[float]:
    """Round values from low to high; of a logarithmic axis powers of ten, or 1, 2, 5 of each."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = (1,) if len(powers) > 3 else (1, 2, 5)
        found = [m * 10.0**p for p in powers for m in marks if low <= m * 10.0**p <= high]
        return found[:: max(1, len(found) // (about + 1))]
    step = _step((high - low) / about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def limits(
    values: Iterable[float], floor: float | None, ceiling: float | None, *, log: bool = False
) -> tuple[float, float]:
    """Ends of an axis that shows all values, with a little room beyond those not fixed."""
    values = list(values)
    if log:
        low, high = min(values), max(values)
        return (low / 1.3, high * 1.3) if low < high else (low / 2, high * 2)
    low = min(values) if floor is None else min(floor, *values)
    high = max(values) if ceiling is None else max(ceiling, *values)
    if low == high:
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    room = 0.06 * (high - low)
    return (
        low if low == floor else low - room,
        high if high == ceiling else high + room,
    )


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in STEPS if m * power >= rough * (1 - 1e-9))


def shown(value: float) -> str:
    """A tick's label: 0.05, 1200, 1.5M, 1e-07."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}" if size >= 1e-3 or value == 0 else f"{value:.0e}"


def finite(values: Sequence[float | None]) -> list[float]:
    """Those that are known."""
    return [value for value in values if value is not None]
