"""Tables of an evaluation for the console."""

import math

from rich.console import Group
from rich.table import Table

from scsdpo.evaluation.figures import LEVEL, Figures
from scsdpo.evaluation.result import Result
from scsdpo.statistics import Estimate

_PLAIN = {"response_length": "response length, tokens"}
_WORDS = {"well_formed": "well formed (hold an answer)", "truncated": "truncated"}


def result_table(result: Result, found: Figures) -> Group:
    """Tables of all figures over all questions, and of mean@k and maj@k by category."""
    overall = Table(title=f"{result.about['policy']}: {len(result.questions)} questions")
    overall.add_column("%")
    overall.add_column("")
    overall.add_column(f"{LEVEL:.0%} interval")
    for name, one in found[""].items():
        label = _PLAIN.get(name) or _WORDS.get(name, name)
        overall.add_row(label, *_cells(one, scale=1 if name in _PLAIN else 100))
    names = list(found[""])[:2]
    parts = Table(title="by category, %")
    parts.add_column("")
    parts.add_column("questions", justify="right")
    for name in names:
        parts.add_column(name)
        parts.add_column("")
    for category, figures in found.items():
        cells = [cell for name in names for cell in _cells(figures[name])]
        parts.add_row(category or "all", str(figures[names[0]].n), *cells)
    tables = [overall, *([parts] if len(found) > 1 else [])]
    return Group(*tables, *([_shown(result)] if result.demonstrations else []))


def _shown(result: Result) -> Table:
    """Table of scores with a right response to the same or to another question in the prompt."""
    assert result.demonstrations is not None
    found = {name: value for name, value in result.demonstrations.items() if name != "questions"}
    k = result.about["sampling"]["n"]
    count = result.demonstrations["questions"]
    table = Table(title=f"shown a demonstration, mean@{k} over the {count} questions solved once")
    table.add_column("%, and gains in points")
    table.add_column("")
    table.add_column(f"{LEVEL:.0%} interval")
    words = {
        "without": "without",
        "own": "with its own right response",
        "another": "with one to another question",
        "own_gain": "gain by its own",
        "another_gain": "gain by another's",
        "own_over_another": "own over another's",
    }
    for name, label in words.items():
        table.add_row(label, *_cells(Estimate(**found[name])))
    return table


def _cells(one: Estimate, scale: float = 100) -> tuple[str, str]:
    known = f"({scale * one.low:.1f} .. {scale * one.high:.1f})"
    return f"{scale * one.value:.1f}", "(not known)" if math.isnan(one.low) else known
