"""A figure as data: panels of layers, which the page draws as SVG and matplotlib for papers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Values = Sequence[float | None]
"""None: unknown there; a line breaks."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Something drawn in a panel, in the color of its tone (`palette.py`)."""

    tone: str
    label: str

    @property
    def data(self) -> dict[str, Any]:
        """What the page lets one hover over and download."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Line(Layer):
    """y over x; `weak`: thin, behind another that says the same more calmly."""

    x: Sequence[float]
    y: Values
    weak: bool = False


@dataclass(frozen=True, kw_only=True)
class Dots(Layer):
    """y over x with an interval each; joined by a line if `joined`."""

    x: Sequence[float]
    y: Values
    low: Values
    high: Values
    joined: bool = True


@dataclass(frozen=True, kw_only=True)
class Area(Layer):
    """Between `low` and `high` over x: a layer of a stack. y is its height."""

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
        title: what is shown, with its unit.
        note: how to read it, one sentence.
        x_label: of the horizontal axis.
        floor: the vertical axis reaches down to it; None: as the data do.
        ceiling: and up to it; None: as the data do.
        log: logarithmic vertical axis; every value must then be > 0.
        steps: x is a batch of training questions, so that a click leads there.
        names: of x = 0, 1, 2, ..., where x is no number.
        run: the only one that it is of.
        paper: the figure of the SC-SDPO paper that it corresponds to, if any.
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
