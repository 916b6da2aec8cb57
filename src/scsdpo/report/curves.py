"""Panels from metrics.jsonl: training, its cost, and checks of the numbers."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from scsdpo.report.palette import run_tone
from scsdpo.report.panels import Area, Dots, Layer, Line, Panel
from scsdpo.report.reading import Run, mean

_LONGEST = 80
"""Most characters of a panel's name."""
SMOOTH = 10
"""Number of points of the running mean, for curves of at least three times as many."""


def slug(name: str) -> str:
    """A figure's name as the name of a panel and a file.

    A category may hold any character: those that a file name or an attribute cannot hold become
    dashes, and a digest keeps such names distinct.
    """
    plain = name.replace("/", "-").replace("_", "-").replace("@", "-at-")
    safe = re.sub(r"[^\w.+-]+", "-", plain, flags=re.ASCII)[:_LONGEST]
    if safe == plain:
        return plain
    return f"{safe}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def over_batches(runs: Sequence[Run]) -> str:
    """Label of the horizontal axis: steps, or batches if some batch took no step."""
    return "training step" if one_step_a_batch(runs) else "batch of questions"


def one_step_a_batch(runs: Sequence[Run]) -> bool:
    """True if every batch took one step, in all runs."""
    return all(line["batch"] == line["step"] for run in runs for line in run.lines)


def line_panel(
    runs: Sequence[Run],
    name: str,
    title: str,
    note: str,
    *,
    scale: float = 1.0,
    log: bool = False,
    paper: str = "",
) -> Panel | None:
    """One figure of all runs: each batch as a faint line under the running mean; None if unknown.

    With `log` the axis is logarithmic where all values are positive and span two decades.
    """
    curves = {}
    for i, run in enumerate(runs):
        x, y = run.curve(name)
        curves[i] = x, [None if v is None else scale * v for v in y]
    values = [v for _, y in curves.values() for v in y if v is not None]
    if not values:
        return None
    layers: list[Layer] = []
    for i, (x, y) in curves.items():
        if x:
            layers += _lines(run_tone(i), runs[i].name, x, y)
    wide = log and min(values) > 0 and max(values) > 100 * min(values)
    return Panel(
        name=slug(name),
        title=title,
        note=note,
        x_label=over_batches(runs),
        layers=sorted(layers, key=lambda layer: not (isinstance(layer, Line) and layer.weak)),
        floor=0.0 if min(values) >= 0 else None,
        log=wide,
        steps=True,
        paper=paper,
    )


def _lines(tone: str, label: str, x: Sequence[float], y: Sequence[float | None]) -> list[Line]:
    if len(x) < 3 * SMOOTH:
        return [Line(tone=tone, label=label, x=x, y=y)]
    smooth = [mean(y[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(y))]
    return [
        Line(tone=tone, label=label, x=x, y=y, weak=True),
        Line(tone=tone, label=label, x=x, y=smooth),
    ]


def several_panels(
    runs: Sequence[Run], names: dict[str, str], name: str, title: str, note: str
) -> list[Panel]:
    """A panel a run: several figures as running means, each with a label.

    Args:
        runs: the runs; a run without the figures has no panel.
        names: labels by the figures' names.
        name: name of the panel.
        title: title of the panel.
        note: note of the panel.
    """
    panels = []
    for i, run in enumerate(runs):
        layers: list[Layer] = []
        for k, (figure, label) in enumerate(names.items()):
            x, y = run.curve(figure)
            if x:
                layers.append(_lines(run_tone(k), label, x, y)[-1])
        if layers:
            several = len(runs) > 1
            values = [v for layer in layers if isinstance(layer, Line) for v in layer.y if v]
            panels.append(
                Panel(
                    name=f"{name}-{i}" if several else name,
                    title=f"{title}: {run.name}" if several else title,
                    note=note,
                    x_label=over_batches(runs),
                    layers=layers,
                    floor=0.0 if min(values, default=0) >= 0 else None,
                    steps=True,
                    run=i,
                )
            )
    return panels


def window_panel(runs: Sequence[Run], name: str, panel: Panel) -> Panel | None:
    """Means of a share over windows of batches, in percent, into the layers of `panel`.

    Windows have 50 batches, as in the paper, for a run of at least 200; else a quarter of the run.
    """
    layers = []
    for i, run in enumerate(runs):
        x, y = run.figure(name)
        size = 50 if len(x) >= 200 else max(1, len(x) // 4)
        starts = range(0, len(x) - size + 1, size)
        windows = [mean(y[s : s + size]) for s in starts]
        nothing = [None] * len(windows)
        layers.append(
            Dots(
                tone=run_tone(i),
                label=run.name,
                x=[mean(x[s : s + size]) or 0.0 for s in starts],
                y=[None if w is None else 100 * w for w in windows],
                low=nothing,
                high=nothing,
            )
        )
    layers = [layer for layer in layers if layer.x]
    return replace(panel, layers=layers) if layers else None


def stack_panels(
    runs: Sequence[Run], names: dict[str, tuple[str, str]], panel: Panel, *, scale: float = 1.0
) -> list[Panel]:
    """A panel a run: stacked figures, as running means.

    Args:
        runs: the runs; a run without the figures has no panel.
        names: tone and label by the figures' names, from below.
        panel: the panels' common attributes.
        scale: factor of all figures.
    """
    panels = []
    for i, run in enumerate(runs):
        curves = {name: run.curve(name) for name in names}
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if not curves:
            continue
        x = max((xs for xs, _ in curves.values()), key=len)
        below, layers = [0.0] * len(x), []
        for name, (_, y) in curves.items():
            tone, label = names[name]
            width = SMOOTH if len(y) >= 3 * SMOOTH else 1
            heights = [
                scale * (mean(y[max(0, j + 1 - width) : j + 1]) or 0.0) for j in range(len(y))
            ]
            heights += [0.0] * (len(x) - len(heights))
            above = [b + h for b, h in zip(below, heights, strict=True)]
            layers.append(Area(tone=tone, label=label, x=x, low=below, high=above))
            below = above
        several = len(runs) > 1
        title = f"{panel.title}: {run.name}" if several else panel.title
        name = f"{panel.name}-{i}" if several else panel.name
        panels.append(replace(panel, layers=layers, name=name, title=title, run=i))
    return panels
