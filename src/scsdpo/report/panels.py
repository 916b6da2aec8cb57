"""Figures as data: panels of layers, which the page draws as SVG and matplotlib for papers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Values = Sequence[float | None]
"""Values; None is unknown and breaks a line."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A drawn element of a panel, in the color of its tone (`palette.py`)."""

    tone: str
    label: str

    @property
    def data(self) -> dict[str, Any]:
        """Data for hovering and for the download."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Line(Layer):
    """A line y over x; `weak`: thin, behind its smoothed version."""

    x: Sequence[float]
    y: Values
    weak: bool = False


@dataclass(frozen=True, kw_only=True)
class Dots(Layer):
    """Points y over x with intervals; joined by a line if `joined`."""

    x: Sequence[float]
    y: Values
    low: Values
    high: Values
    joined: bool = True


@dataclass(frozen=True, kw_only=True)
class Area(Layer):
    """The area between `low` and `high` over x, a layer of a stack; y is its height."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @property
    def data(self) -> dict[str, Any]:
        heights = [high - low for low, high in zip(self.low, self.high, strict=True)]
        return {"tone": self.tone, "label": self.label, "x": list(self.x), "y": heights}


@dataclass(frozen=True, kw_only=True)
class Stairs(Layer):
    """A histogram: heights between edges, one more edge than heights."""

    edges: Sequence[float]
    heights: Sequence[float]

    @property
    def data(self) -> dict[str, Any]:
        pairs = zip(self.edges, self.edges[1:], strict=False)
        middles = [(low + high) / 2 for low, high in pairs]
        return {"tone": self.tone, "label": self.label, "x": middles, "y": list(self.heights)}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot.

    Args:
        name: unique in a page, and the file of `--figures`.
        title: the quantity, with its unit.
        note: one sentence on how to read it.
        x_label: label of the horizontal axis.
        floor: lower end of the vertical axis; None: chosen by the data.
        ceiling: upper end of the vertical axis; None: chosen by the data.
        log: logarithmic vertical axis; every value must then be > 0.
        steps: x is a batch of training questions, so that a click leads there.
        names: labels of x = 0, 1, 2, ..., if x is no number.
        run: index of the run, if it shows a single one.
        paper: the corresponding figure of the SC-SDPO paper, if any.
    """

    name: str
    title: str
    note: str
    x_label: str
    layers: Sequence[Layer]
    floor: float | None = 0.0
    ceiling: float | None = None
    log: bool = False
    steps: bool = False
    names: Sequence[str] = ()
    run: int | None = None
    paper: str = ""
