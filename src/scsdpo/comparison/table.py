"""Tables of comparisons for the console."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from scsdpo.comparison.questions import ComparedFigure, PairedComparison
from scsdpo.comparison.seeds import SeedRow
from scsdpo.evaluation import EvaluatedQuestion
from scsdpo.statistics import Estimate

_LENGTH = 72
"""Characters of a question that are shown."""


def scale(name: str) -> float:
    """Factor for display: shares are shown in percent and points."""
    return 1.0 if name == "response_length" else 100.0


def with_interval(one: Estimate, name: str, stars: str = "") -> str:
    """A difference with its interval, as text."""
    by = scale(name)
    low, high = by * one.low, by * one.high
    if math.isnan(low):  # a single difference, or all equal
        return f"{by * one.value:+.1f} (not known)"
    return f"{by * one.value:+.1f} ({low:+.1f} .. {high:+.1f}){f' {stars}' if stars else ''}"


def findable(value: float, name: str) -> str:
    """The smallest detectable difference, as text."""
    return "-" if math.isnan(value) else f"{scale(name) * value:.1f}"


def figures_table(names: tuple[str, str], rows: Sequence[ComparedFigure]) -> Table:
    """Table of every figure of both policies, and the difference."""
    table = Table(title=f"{names[1]} minus {names[0]}, paired by question", title_justify="left")
    headers = ("", "questions", "first", "second", "difference (95 %)", "findable")
    for column, header in enumerate(headers):
        table.add_column(header, justify="right" if column else "left", no_wrap=column > 0)
    for row in rows:
        by = scale(row.name)
        table.add_row(
            f"{row.category}/{row.name}" if row.category else row.name,
            str(row.difference.n),
            f"{by * row.a.value:.1f}",
            f"{by * row.b.value:.1f}",
            with_interval(row.difference, row.name, "*" if row.difference.tells else ""),
            findable(row.detectable, row.name),
        )
    return table


def answers_table(found: PairedComparison, names: tuple[str, str], most: int) -> Table:
    """Table of the questions that differ most, with the answers of both."""
    title = f"won {len(found.won)}, lost {len(found.lost)} questions; the {most} clearest of each"
    table = Table(title=title, title_justify="left", show_lines=True)
    for header in ("", "question", "gold", *names):
        table.add_column(header, overflow="fold")
    for label, pairs in (("won", found.won), ("lost", found.lost)):
        for a, b in pairs[:most]:
            question = " ".join(a.question.split())
            shown = question if len(question) <= _LENGTH else f"{question[: _LENGTH - 3]}..."
            # Plain text: what models write may look like markup.
            table.add_row(label, Text(shown), Text(a.gold), Text(votes(a)), Text(votes(b)))
    return table


def votes(question: EvaluatedQuestion, most: int = 3) -> str:
    """The most common answers, with their counts and whether they are right."""
    counts = Counter(zip(question.answers, question.successes, strict=True))
    shown = [
        f"{'right' if good else 'wrong'} {n}x {'no answer' if answer is None else answer[:24]!r}"
        for (answer, good), n in counts.most_common(most)
    ]
    return "\n".join(shown)


def seeds_table(baseline: str, found: Mapping[str, Sequence[SeedRow]]) -> Table:
    """Table of every other method minus the baseline."""
    table = Table(title=f"minus {baseline}, paired by seed", title_justify="left")
    headers = ("method", "", "mean", "baseline", "difference (95 %)", "ahead in", "findable")
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column < 2 else "right", no_wrap=column > 0)
    for method, rows in found.items():
        for row in rows:
            by = scale(row.name)
            table.add_row(
                Path(method).name,
                row.name,
                f"{by * row.b:.1f}",
                f"{by * row.a:.1f}",
                with_interval(row.difference, row.name, stars(row)),
                f"{row.ahead} of {row.difference.n}",
                findable(row.detectable, row.name),
            )
    return table


def stars(row: SeedRow) -> str:
    """`*`: 0 lies outside the interval; `**`: also outside the Bonferroni interval."""
    return "**" if row.joint.tells else "*" if row.difference.tells else ""
