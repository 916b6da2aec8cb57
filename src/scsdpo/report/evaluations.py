"""A run's validations question by question: intervals, and differences between runs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scsdpo.io.files import whole_object
from scsdpo.statistics import Estimate, paired_interval

SCHEMA = 1
"""Schema version of the files that are read."""
Figures = Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class RecordedEvaluation:
    """The content of `evaluations/val-BATCH.json`."""

    figures: Figures
    """Estimates by category ("all"), then by name."""
    scores: Mapping[str, float]
    """Mean reward of each question, by key."""
    solved: Mapping[str, bool]
    """True if any response to the question was right, by key."""


def read_evaluations(folder: Path) -> dict[int, RecordedEvaluation]:
    """A run's evaluations by batch; empty if it has none."""
    found = {}
    for path in sorted((folder / "evaluations").glob("val-*.json")):
        name = re.fullmatch(r"val-(\d+)", path.stem)
        content = whole_object(path, "figures", "questions") if name else {}
        if name and content.get("schema_version") == SCHEMA:
            found[int(name[1])] = RecordedEvaluation(
                figures={
                    category: {name: _estimate(**figure) for name, figure in figures.items()}
                    for category, figures in content["figures"].items()
                },
                scores={
                    question["key"]: sum(question["rewards"]) / len(question["rewards"])
                    for question in content["questions"]
                },
                solved={
                    question["key"]: any(question["successes"]) for question in content["questions"]
                },
            )
    return dict(sorted(found.items()))


def _estimate(value: float | None, low: float | None, high: float | None, n: int) -> Estimate:
    nan = float("nan")
    return Estimate(
        value=nan if value is None else value,
        low=nan if low is None else low,
        high=nan if high is None else high,
        n=n,
    )


def solved_difference(after: RecordedEvaluation, before: RecordedEvaluation) -> Estimate | None:
    """Paired difference of the share of questions with a right response; None: other questions."""
    if not after.solved or after.solved.keys() != before.solved.keys():
        return None
    then = [float(before.solved[key]) for key in after.solved]
    return paired_interval(then, [float(now) for now in after.solved.values()])


def difference(after: RecordedEvaluation, before: RecordedEvaluation) -> Estimate | None:
    """Paired difference of mean reward, after less before; None: other questions were asked."""
    if not after.scores or after.scores.keys() != before.scores.keys():
        return None
    then = [before.scores[key] for key in after.scores]
    return paired_interval(then, list(after.scores.values()))
