"""The panels of validation: accuracy on held-out questions, before, after, and on the way."""

from collections.abc import Sequence

from scsdpo.report.curves import over_batches, slug
from scsdpo.report.palette import run_tone
from scsdpo.report.panels import Dots, Layer, Line, Panel
from scsdpo.report.reading import Run

MOST_CATEGORIES = 9
"""With a place of their own; more would be a page of their own."""
NOTES = {
    "mean": "Mean reward of k responses to each held-out question.",
    "maj": "Reward of the most common of k answers to each held-out question.",
}


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Before and after by category, and curves where there were validations on the way."""
    names = sorted({name for run in runs for name in run.names("val/")})
    whole = sorted((name for name in names if "/" not in name), reverse=True)
    parts = [name for name in names if "/" in name]
    found = [_before_after(runs, name, parts) for name in whole]
    if any(len(run.validations) > 2 for run in runs):
        found += [_over_batches(runs, name) for name in whole]
        means = [name for name in parts if "/mean@" in name]
        found += [_over_batches(runs, name) for name in means[:MOST_CATEGORIES]]
    return [panel for panel in found if panel]


def _before_after(runs: Sequence[Run], whole: str, parts: Sequence[str]) -> Panel | None:
    """Of all questions and of each category, a place on the horizontal axis."""
    own = [name for name in parts if name.endswith(f"/{whole}") and name.count("/") == 1]
    names = [whole, *(own if len(own) <= MOST_CATEGORIES else [])]
    layers: list[Layer] = []
    for i, run in enumerate(run for run in runs if len(run.validations) > 1):
        shift = 0.5 * ((i + 0.5) / len(runs) - 0.5)
        layers.append(_joints(run, names, shift, run_tone(runs.index(run))))
        for tone, label, line in (
            ("start", "before", run.validations[0]),
            (
                run_tone(runs.index(run)),
                "after" if len(runs) == 1 else run.name,
                run.validations[-1],
            ),
        ):
            y = [line.get(f"val/{name}") for name in names]
            nothing = [None] * len(names)
            layers.append(
                Dots(
                    tone=tone,
                    label=label,
                    x=[place + shift for place in range(len(names))],
                    y=[None if value is None else 100 * value for value in y],
                    low=nothing,
                    high=nothing,
                    joined=False,
                )
            )
    return (
        Panel(
            name=slug(f"before-after-{whole}"),
            title=f"{whole} before and after, %",
            note=NOTES.get(whole.partition("@")[0], "On held-out questions."),
            x_label="category" if len(names) > 1 else "",
            names=["all", *(name.rpartition("/")[0] for name in names[1:])],
            layers=layers,
        )
        if layers
        else None
    )


def _joints(run: Run, names: Sequence[str], shift: float, tone: str) -> Line:
    """From each "before" to its "after"."""
    x = [place + shift for place in range(len(names)) for _ in range(3)]
    y: list[float | None] = []
    for name in names:
        ends = [run.validations[at].get(f"val/{name}") for at in (0, -1)]
        y += [*(None if end is None else 100 * end for end in ends), None]
    return Line(tone=tone, label="", x=x, y=y, weak=True)


def _over_batches(runs: Sequence[Run], name: str) -> Panel | None:
    layers: list[Layer] = []
    for i, run in enumerate(runs):
        known = [line for line in run.validations if line.get(f"val/{name}") is not None]
        if known:
            nothing = [None] * len(known)
            layers.append(
                Dots(
                    tone=run_tone(i),
                    label=run.name,
                    x=[line["batch"] for line in known],
                    y=[100 * line[f"val/{name}"] for line in known],
                    low=nothing,
                    high=nothing,
                )
            )
    category, _, figure = name.rpartition("/")
    return (
        Panel(
            name=slug(f"val/{name}"),
            title=f"{figure}{f' of {category}' if category else ''}, %",
            note=NOTES.get(figure.partition("@")[0], "On held-out questions."),
            x_label=over_batches(runs),
            layers=layers,
            floor=None,
        )
        if layers
        else None
    )
