"""Panels of validation: accuracy on held-out questions before, after and during training."""

import math
from collections.abc import Sequence

from scsdpo.report.curves import over_batches, slug
from scsdpo.report.palette import run_tone
from scsdpo.report.panels import Dots, Layer, Line, Panel
from scsdpo.report.reading import Run

MOST_CATEGORIES = 9
"""Most categories that are shown."""
NOTES = {
    "mean": "Mean reward of k responses to each held-out question.",
    "maj": "Reward of the most common of k answers to each held-out question.",
}


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Panels of before and after by category, and curves if there were validations in between."""
    names = sorted({name for run in runs for name in run.names("val/")})
    whole = sorted((name for name in names if "/" not in name), reverse=True)
    parts = [name for name in names if "/" in name]
    found = [*(_before_after(runs, name, parts) for name in whole), _pass_at_k(runs)]
    if any(len(run.validations) > 2 for run in runs):
        found += [_over_batches(runs, name) for name in whole]
        means = [name for name in parts if "/mean@" in name]
        found += [_over_batches(runs, name) for name in means[:MOST_CATEGORIES]]
    return [panel for panel in found if panel]


def _before_after(runs: Sequence[Run], whole: str, parts: Sequence[str]) -> Panel | None:
    """Before and after of all questions and of each category, side by side."""
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
            ends = [_interval(run, line["batch"], name) for name in names]
            layers.append(
                Dots(
                    tone=tone,
                    label=label,
                    x=[place + shift for place in range(len(names))],
                    y=[_percent(line.get(f"val/{name}")) for name in names],
                    low=[low for low, _ in ends],
                    high=[high for _, high in ends],
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
    """A line from each "before" to its "after"."""
    x = [place + shift for place in range(len(names)) for _ in range(3)]
    y: list[float | None] = []
    for name in names:
        y += [*(_percent(run.validations[at].get(f"val/{name}")) for at in (0, -1)), None]
    return Line(tone=tone, label="", x=x, y=y, weak=True)


def _percent(value: float | None) -> float | None:
    return 100 * value if value is not None and math.isfinite(value) else None


def _interval(run: Run, batch: int, name: str) -> tuple[float | None, float | None]:
    """The 95 % interval of a figure in percent; None, None if its questions were not kept."""
    category, _, figure = name.rpartition("/")
    evaluation = run.evaluations.get(batch)
    known = evaluation.figures.get(category or "all", {}).get(figure) if evaluation else None
    return (_percent(known.low), _percent(known.high)) if known else (None, None)


def _pass_at_k(runs: Sequence[Run]) -> Panel | None:
    """pass@k over k at the last validation, and for one run at the first."""
    layers: list[Layer] = []
    ks: list[str] = []
    for i, run in enumerate(runs):
        batches = list(run.evaluations)
        ends = [(run_tone(i), run.name if len(runs) > 1 else "after", batches[-1:])]
        if len(runs) == 1 and len(batches) > 1:
            ends.insert(0, ("start", "before", batches[:1]))
        for tone, label, at in ends:
            figures = run.evaluations[at[0]].figures.get("all", {}) if at else {}
            curve = {n.removeprefix("pass@"): e for n, e in figures.items() if "pass@" in n}
            ks = list(curve) if len(curve) > len(ks) else ks
            layers.append(
                Dots(
                    tone=tone,
                    label=label,
                    x=[float(place) for place in range(len(curve))],
                    y=[_percent(each.value) for each in curve.values()],
                    low=[_percent(each.low) for each in curve.values()],
                    high=[_percent(each.high) for each in curve.values()],
                )
            )
    return (
        Panel(
            name="pass-at-k",
            title="pass@k, %",
            note="Chance that one of k responses is right, unbiased.",
            x_label="k",
            names=ks,
            layers=[layer for layer in layers if layer.data["x"]],
            floor=None,
        )
        if ks
        else None
    )


def _over_batches(runs: Sequence[Run], name: str) -> Panel | None:
    layers: list[Layer] = []
    for i, run in enumerate(runs):
        known = [line for line in run.validations if line.get(f"val/{name}") is not None]
        if known:
            ends = [_interval(run, line["batch"], name) for line in known]
            layers.append(
                Dots(
                    tone=run_tone(i),
                    label=run.name,
                    x=[line["batch"] for line in known],
                    y=[_percent(line[f"val/{name}"]) for line in known],
                    low=[low for low, _ in ends],
                    high=[high for _, high in ends],
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
