"""The panels of validation: accuracy on held-out questions as training goes on."""

from collections.abc import Sequence

from scsdpo.report.curves import over_batches, slug
from scsdpo.report.palette import run_tone
from scsdpo.report.panels import Dots, Layer, Panel
from scsdpo.report.reading import Run

MOST_CATEGORIES = 9
"""With a panel of their own; more would be a page of their own."""


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Overall figures, then mean@k of each category, if they are few."""
    names = list(dict.fromkeys(name for run in runs for name in run.names("val/")))
    whole = [name for name in names if "/" not in name]
    parts = [name for name in names if "/" in name and "mean@" in name]
    parts = parts if len(parts) <= MOST_CATEGORIES else []
    return [panel for name in (*whole, *parts) if (panel := _panel(runs, name))]


def _panel(runs: Sequence[Run], name: str) -> Panel | None:
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
            note=_NOTES.get(figure.partition("@")[0], "On held-out questions."),
            x_label=over_batches(runs),
            layers=layers,
            floor=None,
        )
        if layers
        else None
    )


_NOTES = {
    "mean": "Mean reward of k responses to each held-out question.",
    "maj": "Reward of the most common of k answers to each held-out question.",
}
