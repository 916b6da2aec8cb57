"""Distance of the teacher by correctness and by pass rate: Figure 4 of the paper."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scsdpo.io.files import whole_lines, whole_object
from scsdpo.report.curves import slug
from scsdpo.report.palette import run_tone
from scsdpo.report.panels import Dots, Layer, Panel, Stairs
from scsdpo.report.reading import Run, mean, spread_out

MEASURES = {
    "reverse_kl": "Reverse KL of student and teacher, nats",
    "jsd": "Jensen-Shannon divergence, nats",
    "log_teacher_over_student": "log T(y) / S(y), nats",
    "half_log_student_over_mixture": "½ log S(y) / M(y), nats",
}
BINS = 24
FEWEST = 20
"""Least number of responses for a density."""
MOST_FILES = 100
"""Most trace files that are read; of more, this many spread over the run."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A response's means over its tokens."""

    run: int
    correct: bool
    pass_rate: float
    values: dict[str, float]


def distances(runs: Sequence[Run]) -> tuple[list[Distance], str]:
    """Distances of all known responses, and their origin in words.

    `analysis.json` of `scsdpo analyze` in a run's folder is preferred: it has one policy and more
    responses. Traces are of all batches of the run.
    """
    analyzed = [d for i, run in enumerate(runs) for d in _analyzed(i, run)]
    if analyzed:
        return analyzed, "Measured by scsdpo analyze."
    traced = [d for i, run in enumerate(runs) for d in _traced(i, run)]
    return traced, "Of the responses whose tokens were traced, over the whole run."


def _analyzed(i: int, run: Run) -> Iterable[Distance]:
    path = run.folder / "analysis.json"
    for row in whole_object(path, "rows").get("rows", []):
        yield Distance(
            run=i, correct=row["correct"], pass_rate=row["pass_rate"], values=row["values"]
        )


def _traced(i: int, run: Run) -> Iterable[Distance]:
    for path in spread_out(sorted((run.folder / "tokens").glob("train_*.jsonl")))[:MOST_FILES]:
        responses = {
            (line["key"], line["sample"]): line
            for line in whole_lines(run.folder / "rollouts" / path.name, "key", "sample")
        }
        for line in whole_lines(path, "key", "sample"):
            response = responses.get((line["key"], line["sample"]))
            values = measured(line)
            if response and values:
                yield Distance(
                    run=i,
                    correct=response["success"],
                    pass_rate=response["pass_rate"],
                    values=values,
                )


def measured(line: dict[str, Any]) -> dict[str, float]:
    """The four measures of a traced response; empty without a teacher."""
    pairs = [
        (s, t)
        for s, t in zip(line["logprob"], line["teacher_logprob"], strict=True)
        if s is not None and t is not None
    ]
    means = {
        "reverse_kl": mean(line["reverse_kl"]),
        "jsd": mean(line["jsd"]),
        "log_teacher_over_student": mean([t - s for s, t in pairs]),
        "half_log_student_over_mixture": mean([_over_mixture(s, t) / 2 for s, t in pairs]),
    }
    known = {name: value for name, value in means.items() if value is not None}
    return known if len(known) == len(means) else {}


def _over_mixture(s: float, t: float) -> float:
    """The logarithm of S / M, M = (S + T) / 2, from log S and log T."""
    top = max(s, t)
    return s - (top + math.log(math.exp(s - top) + math.exp(t - top)) - math.log(2))


def panels(found: Sequence[Distance], runs: Sequence[Run]) -> list[Panel]:
    """Panels of densities by correctness, if there are enough responses, and of means by pass rate
    with one standard deviation.
    """
    measures = [name for name in MEASURES if found and all(name in d.values for d in found)]
    densities = [_density(name, found) for name in measures]
    return [
        *(panel for panel in densities if panel.layers),
        *(_by_pass_rate(name, found, runs) for name in measures),
    ]


def too_few(found: Sequence[Distance]) -> list[str]:
    """A sentence that names responses without a density; empty if there are none."""
    counts = {name: _count(found, correct) for name, correct in (("right", True), ("wrong", False))}
    few = [f"{count} {name}" for name, count in counts.items() if 0 < count < FEWEST]
    if not few:
        return []
    return [f"Of {' and '.join(few)} there is no density: it takes {FEWEST} responses."]


def _count(found: Sequence[Distance], correct: bool) -> int:
    return sum(d.correct is correct for d in found)


def _density(name: str, found: Sequence[Distance]) -> Panel:
    values = sorted(d.values[name] for d in found)
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    width = max(high - low, 1e-9) / BINS
    edges = [low + width * i for i in range(BINS + 1)]
    layers: list[Layer] = []
    for correct, tone, label in ((True, "right", "right"), (False, "wrong", "wrong")):
        own = [d.values[name] for d in found if d.correct is correct]
        bins = [min(max(int((v - low) / width), 0), BINS - 1) for v in own]
        if len(own) >= FEWEST:
            heights = [bins.count(i) / (len(own) * width) for i in range(BINS)]
            layers.append(
                Stairs(tone=tone, label=f"{label} ({len(own)})", edges=edges, heights=heights)
            )
    return Panel(
        name=slug(f"{name}-density"),
        title=MEASURES[name],
        note="Density of responses, right and wrong; each a mean over its tokens, the outer 2 % at "
        "the ends.",
        x_label="nats",
        layers=layers,
        paper="Figure 4",
    )


def _by_pass_rate(name: str, found: Sequence[Distance], runs: Sequence[Run]) -> Panel:
    layers: list[Layer] = []
    for i in sorted({d.run for d in found}):
        rates = sorted({d.pass_rate for d in found if d.run == i})
        groups = [[d.values[name] for d in found if d.run == i and d.pass_rate == r] for r in rates]
        means = [sum(group) / len(group) for group in groups]
        spreads = [
            math.sqrt(sum((v - m) ** 2 for v in group) / len(group))
            for group, m in zip(groups, means, strict=True)
        ]
        layers.append(
            Dots(
                tone=run_tone(i),
                label=runs[i].name,
                x=rates,
                y=means,
                low=[m - s for m, s in zip(means, spreads, strict=True)],
                high=[m + s for m, s in zip(means, spreads, strict=True)],
            )
        )
    return Panel(
        name=slug(f"{name}-by-pass-rate"),
        title=f"{MEASURES[name].removesuffix(', nats')} by pass rate",
        note="Mean of responses and one standard deviation, by their question's pass rate.",
        x_label="pass rate of the question",
        layers=layers,
        floor=None,
        paper="Figure 4",
    )
