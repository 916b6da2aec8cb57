"""Panels on the attempts of `scsdpo solve` at one question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scsdpo.io.files import whole_lines
from scsdpo.report.palette import run_tone
from scsdpo.report.panels import Dots, Layer, Line, Panel
from scsdpo.report.reading import MOST_POINTS, Run
from scsdpo.statistics import score_interval

ATTEMPTS = "attempts.jsonl"
_ASIDE = 0.012
"""Distance between the intervals of two curves at the same k, as a share of the axis."""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """The attempts of one run."""

    successes: Sequence[bool]
    answers: Sequence[str | None]

    @property
    def first(self) -> int | None:
        """Number of the first right attempt, from 1; None: none is right."""
        return self.successes.index(True) + 1 if True in self.successes else None


DiscoveryCurve = Sequence[tuple[int, float, float, float]]
"""k, discovery@k, and the bounds of its interval; nan: not known."""


def attempts_of(runs: Sequence[Run]) -> dict[int, Attempts]:
    """Attempts by the run's index, of runs that `scsdpo solve` made."""
    found = {}
    for i, run in enumerate(runs):
        lines = list(whole_lines(run.folder / ATTEMPTS, "attempt", "success"))
        if lines:
            found[i] = Attempts(
                successes=[bool(line["success"]) for line in lines],
                answers=[line.get("answer") for line in lines],
            )
    return found


def discovery(firsts: Sequence[int | None], ks: Sequence[int]) -> DiscoveryCurve:
    """discovery@k: the share of runs, a question and a seed each, with a right attempt by the k-th.

    Args:
        firsts: number of each run's first right attempt, from 1; None: none was right.
        ks: at most as many as the runs without a right attempt have made.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802, section 5.
    """
    curve = []
    for k in ks:
        found = score_interval([float(first is not None and first <= k) for first in firsts])
        curve.append((k, found.value, found.low, found.high))
    return curve


def discovery_panel(curves: Mapping[str, DiscoveryCurve], note: str) -> Panel:
    """Curves of discovery@k by label; intervals at the last k, and at powers of two before it.

    Args:
        curves: over the same k, ascending.
        note: one sentence on the curves.
    """
    layers: list[Layer] = []
    tones = [run_tone(i) for i in range(len(curves))] if len(curves) > 1 else ["right"]
    last = max(curve[-1][0] for curve in curves.values())
    for i, (tone, label, curve) in enumerate(zip(tones, curves, curves.values(), strict=True)):
        aside = _ASIDE * last * (i - (len(curves) - 1) / 2)
        told = [
            each
            for each in curve
            if each[0] == last or (math.log2(each[0]) % 1 == 0 and each[0] >= last / 8)
        ]
        layers.append(
            Dots(
                tone=tone,
                label=label,
                x=[k + aside for k, *_ in told],
                y=[100 * value for _, value, _, _ in told],
                low=[_percent(low) for _, _, low, _ in told],
                high=[_percent(high) for _, _, _, high in told],
                joined=False,
            )
        )
        layers.append(
            Line(
                tone=tone,
                label=label,
                x=[k for k, *_ in curve],
                y=[100 * value for _, value, _, _ in curve],
            )
        )
    return Panel(
        name="discovery",
        title="Solved within k attempts, %",
        note=note,
        x_label="attempts, k",
        layers=layers,
        ceiling=100,
    )


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Panels on runs that `scsdpo solve` made; none for other runs."""
    found = attempts_of(runs)
    if not found:
        return []
    made = []
    if len(found) > 1:
        # A run without a success says nothing about k beyond its attempts.
        known = [len(each.successes) for each in found.values() if each.first is None]
        most = min(known, default=max(len(each.successes) for each in found.values()))
        curve = discovery([each.first for each in found.values()], _places(most))
        note = f"Share of {len(found)} runs with a right attempt among the first k; 95 %."
        made.append(discovery_panel({"scsdpo solve": curve}, note))
    layers = []
    for i, each in found.items():
        counts, seen = [], set()
        for answer in each.answers:
            seen.add(answer)
            counts.append(len(seen - {None}))
        places = _places(len(counts))
        layers.append(
            Line(
                tone=run_tone(i),
                label=runs[i].name,
                x=places,
                y=[counts[place - 1] for place in places],
            )
        )
    made.append(
        Panel(
            name="answers",
            title="Different answers so far",
            note="A curve that turns flat repeats itself; it ends with the first right attempt.",
            x_label="attempts",
            layers=layers,
        )
    )
    return made


def _places(most: int) -> list[int]:
    """1 to `most`, in at most about `MOST_POINTS` steps."""
    step = max(1, math.ceil(most / MOST_POINTS))
    return sorted({*range(1, most + 1, step), *(1 << n for n in range(most.bit_length())), most})


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else 100 * value
