"""Draw panels as SVG, with classes that the page's style sheet colors in either theme."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from html import escape
from typing import Any

from scsdpo.report.pack import readable
from scsdpo.report.palette import dashes
from scsdpo.report.panels import Area, Dots, Layer, Line, Panel, Stairs

WIDTH, HEIGHT = 400, 220
LEFT, TOP, RIGHT, BOTTOM = 42, 8, 390, 182
"""The box in which data are drawn."""
LETTER = 5.5
"""Mean width of a letter of a tick's label."""
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to positions start..end in pixels; `log`: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Position of a value; one beyond an end is put at that end."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        share = (min(max(value, low), high) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def ticks(low: float, high: float, about: int, *, log: bool = False) -> list[float]:
    """Round values from low to high; on a logarithmic axis powers of ten, or 1, 2, 5 times them."""
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
    """Ends of an axis that shows all values, with a margin at ends that are not fixed."""
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
    return next(m * power for m in _STEPS if m * power >= rough * (1 - 1e-9))


def shown(value: float) -> str:
    """Label of a tick: 0.05, 1200, 1.5M, 1e-07."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}" if size >= 1e-3 or value == 0 else f"{value:.0e}"


def finite(values: Sequence[float | None]) -> list[float]:
    """The known values."""
    return [value for value in values if value is not None]


def draw(panel: Panel) -> tuple[str, dict[str, Any]]:
    """A panel's SVG, and its data for hovering."""
    x, y = _axes(panel)
    parts = [*_frame(panel, x, y), *(mark for layer in panel.layers for mark in marks(layer, x, y))]
    svg = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'data-panel="{escape(panel.name)}" aria-label="{_text(panel.title)}: '
        f'{_text(panel.note)} Arrow keys read values.">{"".join(parts)}</svg>'
    )
    return svg, {
        "name": panel.name,
        "title": panel.title,
        "x": panel.x_label,
        "names": list(panel.names),
        "steps": panel.steps,
        "run": panel.run,
        "stacked": any(isinstance(layer, Area) for layer in panel.layers),
        "box": [LEFT, TOP, RIGHT, BOTTOM],
        "domain": [x.low, x.high, y.low, y.high],
        "log": panel.log,
        "layers": [layer.data for layer in panel.layers],
    }


def _axes(panel: Panel) -> tuple[Axis, Axis]:
    xs, ys = zip(*(extent(layer) for layer in panel.layers), strict=True)
    across = [value for values in xs for value in values] or [0.0, 1.0]
    up = [value for values in ys for value in values] or [0.0, 1.0]
    if panel.names:
        across += [-0.5, len(panel.names) - 0.5]
    left, right = min(across), max(across)
    if left == right:
        left, right = left - 1, right + 1
    elif not (panel.steps or panel.names) and any(isinstance(x, Dots) for x in panel.layers):
        left, right = left - 0.03 * (right - left), right + 0.03 * (right - left)
    bottom, top = limits(up, panel.floor, panel.ceiling, log=panel.log)
    return Axis(left, right, LEFT, RIGHT), Axis(bottom, top, BOTTOM, TOP, panel.log)


@singledispatch
def extent(layer: Layer) -> tuple[list[float], list[float]]:
    """All x and all y of a layer."""
    raise TypeError(f"nobody draws a {type(layer).__name__}")


@extent.register
def _(layer: Line) -> tuple[list[float], list[float]]:
    return list(layer.x), finite(layer.y)


@extent.register
def _(layer: Dots) -> tuple[list[float], list[float]]:
    return list(layer.x), finite([*layer.y, *layer.low, *layer.high])


@extent.register
def _(layer: Area) -> tuple[list[float], list[float]]:
    return list(layer.x), [*layer.low, *layer.high]


@extent.register
def _(layer: Stairs) -> tuple[list[float], list[float]]:
    return list(layer.edges), list(layer.heights)


def _frame(panel: Panel, x: Axis, y: Axis) -> Iterator[str]:
    for value in ticks(y.low, y.high, 4, log=panel.log):
        at = _n(y.place(value))
        yield f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>'
        yield f'<text class="tick y" x="{LEFT - 6}" y="{at}">{shown(value)}</text>'
    room = int((RIGHT - LEFT) / max(len(panel.names), 1) / LETTER)
    names = {float(i): _text(_within(name, room)) for i, name in enumerate(panel.names)}
    for value, name in (names or {v: shown(v) for v in ticks(x.low, x.high, 5)}).items():
        at = _n(x.place(value))
        yield f'<path class="mark" d="M{at} {BOTTOM}v4"/>'
        yield f'<text class="tick x" x="{at}" y="{BOTTOM + 16}">{name}</text>'
    middle = (LEFT + RIGHT) / 2
    yield f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'
    yield f'<text class="label" x="{middle}" y="{BOTTOM + 33}">{_text(panel.x_label)}</text>'


def _text(words: str) -> str:
    """Escaped text: no markup, and no characters that a parser drops."""
    return escape(readable(words))


def _within(name: str, letters: int) -> str:
    """A name, cut to its space on the axis; hovering shows it whole."""
    return name if len(name) <= max(letters, 2) else f"{name[: max(letters, 2) - 1]}…"


@singledispatch
def marks(layer: Layer, x: Axis, y: Axis) -> list[str]:
    """The elements that draw a layer."""
    raise TypeError(f"nobody draws a {type(layer).__name__}")


@marks.register
def _(layer: Line, x: Axis, y: Axis) -> list[str]:
    weight = "weak" if layer.weak else "line"
    return [_path(layer, weight, _broken(layer.x, layer.y, x, y))]


@marks.register
def _(layer: Dots, x: Axis, y: Axis) -> list[str]:
    parts = []
    if layer.joined:
        parts.append(_path(layer, "line", _broken(layer.x, layer.y, x, y)))
    whiskers, dots = [], []
    for at, value, low, high in zip(layer.x, layer.y, layer.low, layer.high, strict=True):
        if value is None:
            continue
        place = _n(x.place(at))
        dots.append(f'<circle cx="{place}" cy="{_n(y.place(value))}" r="3"/>')
        if low is not None and high is not None:
            whiskers.append(f"M{place} {_n(y.place(low))}V{_n(y.place(high))}")
    parts.append(f'<path class="whisker {layer.tone}" d="{"".join(whiskers)}"/>')
    parts.append(f'<g class="dots {layer.tone}">{"".join(dots)}</g>')
    return parts


@marks.register
def _(layer: Area, x: Axis, y: Axis) -> list[str]:
    there = [(at, high) for at, high in zip(layer.x, layer.high, strict=True)]
    back = [(at, low) for at, low in zip(layer.x, layer.low, strict=True)][::-1]
    outline = "L".join(f"{_n(x.place(at))} {_n(y.place(v))}" for at, v in there + back)
    return [f'<path class="area {layer.tone}" d="M{outline}Z"/>']


@marks.register
def _(layer: Stairs, x: Axis, y: Axis) -> list[str]:
    outline = f"M{_n(x.place(layer.edges[0]))} {BOTTOM}"
    for low, high, height in zip(layer.edges, layer.edges[1:], layer.heights, strict=False):
        outline += f"L{_n(x.place(low))} {_n(y.place(height))}H{_n(x.place(high))}"
    outline += f"V{BOTTOM}"
    return [
        f'<path class="fill {layer.tone}" d="{outline}Z"/>',
        f'<path class="line {layer.tone}" d="{outline}"/>',
    ]


def _path(layer: Layer, weight: str, outline: str) -> str:
    dash = dashes(layer.tone) if weight == "line" else ""
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{weight} {layer.tone}"{pattern} d="{outline}"/>'


def _broken(xs: Sequence[float], ys: Sequence[float | None], x: Axis, y: Axis) -> str:
    """A path that is interrupted at unknown values."""
    parts, pen = [], "M"
    for at, value in zip(xs, ys, strict=True):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{_n(x.place(at))} {_n(y.place(value))}")
        pen = "L"
    return "".join(parts)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
