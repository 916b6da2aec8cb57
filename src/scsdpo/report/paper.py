"""Write panels as files for papers, with matplotlib from the extra `report`."""

from collections.abc import Iterable
from functools import singledispatch
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scsdpo.report.palette import LIGHT, dashes
from scsdpo.report.panels import Area, Dots, Layer, Line, Panel, Stairs

SIZE = (3.4, 2.4)
"""Size in inches: a column of a paper."""
LETTERS = 60
"""Most letters of a legend's entries in one row."""
STYLE = {
    "font.size": 8,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e5e0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "scsdpo",  # the same figure is the same file
}


def save(panels: Iterable[Panel], folder: Path) -> list[Path]:
    """Write NAME.svg and NAME.png (300 dpi) of each panel; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for panel in panels:
            figure = _figure(panel)
            for kind in ("svg", "png"):
                path = folder / f"{panel.name}.{kind}"
                figure.savefig(path, dpi=300, metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
    return written


def _figure(panel: Panel) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    ax = figure.subplots()
    for layer in panel.layers:
        draw(layer, ax)
    ax.set(xlabel=panel.x_label, ylabel=fill(panel.title, 34))
    ax.margins(x=0.01)
    if panel.names:
        ax.set_xticks(range(len(panel.names)), panel.names)
        ax.set_xlim(-0.5, len(panel.names) - 0.5)
    if panel.log:
        ax.set_yscale("log")
    elif panel.floor is not None:
        ax.set_ylim(bottom=min(panel.floor, ax.get_ylim()[0]) if ax.dataLim.y0 < 0 else panel.floor)
    if panel.ceiling is not None:
        ax.set_ylim(top=panel.ceiling)
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        named = dict(zip(labels, handles, strict=True))  # a line and its dots share a label
        figure.legend(
            named.values(),
            named.keys(),
            loc="outside upper center",
            ncols=max(1, min(3, LETTERS // (max(map(len, named)) + 5))),
            handlelength=1.4,
            columnspacing=1,
        )
    return figure


@singledispatch
def draw(layer: Layer, ax: Axes) -> None:
    """Draw a layer."""
    raise TypeError(f"nobody draws a {type(layer).__name__}")


@draw.register
def _(layer: Line, ax: Axes) -> None:
    y = [float("nan") if value is None else value for value in layer.y]
    if layer.weak:
        ax.plot(layer.x, y, color=LIGHT[layer.tone], linewidth=0.5, alpha=0.3)
    else:
        style = _dashes(layer.tone)
        ax.plot(
            layer.x, y, color=LIGHT[layer.tone], linewidth=1.2, linestyle=style, label=layer.label
        )


@draw.register
def _(layer: Dots, ax: Axes) -> None:
    known = [
        (x, y, low, high)
        for x, y, low, high in zip(layer.x, layer.y, layer.low, layer.high, strict=True)
        if y is not None
    ]
    x, y = [k[0] for k in known], [k[1] for k in known]
    below = [0.0 if low is None else y - low for _, y, low, _ in known]
    above = [0.0 if high is None else high - y for _, y, _, high in known]
    ax.errorbar(
        x,
        y,
        yerr=[below, above],
        color=LIGHT[layer.tone],
        linestyle=_dashes(layer.tone) if layer.joined else "none",
        linewidth=1.2,
        marker="o",
        markersize=3,
        markerfacecolor="white",
        label=layer.label,
    )


@draw.register
def _(layer: Area, ax: Axes) -> None:
    color = LIGHT[layer.tone]
    ax.fill_between(layer.x, layer.low, layer.high, color=color, linewidth=0, label=layer.label)


@draw.register
def _(layer: Stairs, ax: Axes) -> None:
    color = LIGHT[layer.tone]
    ax.stairs(layer.heights, layer.edges, color=color, label=layer.label)
    ax.stairs(layer.heights, layer.edges, color=color, alpha=0.15, fill=True)


def _dashes(tone: str) -> str | tuple[int, tuple[float, ...]]:
    """The page's dashes, in points of a thinner line."""
    pattern = tuple(float(part) / 2 for part in dashes(tone).split())
    return (0, pattern) if pattern else "-"
