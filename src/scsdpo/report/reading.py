"""Read a run's folder."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from scsdpo.errors import ConfigurationError
from scsdpo.io.files import tell, whole_lines, whole_object
from scsdpo.report.evaluations import RecordedEvaluation, read_evaluations

MOST_POINTS = 400
"""Most points of a curve; a longer one is shown as means of neighboring batches."""

PHASES = {
    "rollout": "sampling",
    "verify": "verifying",
    "teacher": "the teacher",
    "student": "the student",
    "step": "the optimizer",
}
"""Phases of a step, in words."""
T = TypeVar("T")
LogLine = dict[str, Any]
Curve = tuple[list[float], list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The files of a run; missing ones are empty."""

    name: str
    folder: Path
    lines: Sequence[LogLine]
    """Lines of metrics.jsonl, one for each batch of training questions."""

    @cached_property
    def training(self) -> list[LogLine]:
        """Lines of batches that were trained on."""
        return [line for line in self.lines if any(key.startswith("train/") for key in line)]

    @cached_property
    def validations(self) -> list[LogLine]:
        """Lines with a validation."""
        return [line for line in self.lines if any(key.startswith("val/") for key in line)]

    @cached_property
    def evaluations(self) -> dict[int, RecordedEvaluation]:
        """Its validations with all questions, by batch; empty if they were not kept."""
        return read_evaluations(self.folder)

    @cached_property
    def config_text(self) -> str:
        """The text of config.yaml."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml; empty if it is incomplete."""
        try:
            found = yaml.safe_load(self.config_text) or {}
        except yaml.YAMLError:
            found = None
        if not isinstance(found, dict):
            tell(f"{self.folder / 'config.yaml'} is incomplete and was skipped")
            return {}
        return found

    @cached_property
    def environment(self) -> list[tuple[str, str]]:
        """Its versions and hardware, as far as the folder records them."""
        return list(whole_object(self.folder / "environment.json").items())

    def names(self, prefix: str) -> list[str]:
        """Names of all figures with this prefix, without the prefix."""
        found = dict.fromkeys(key for line in self.lines for key in line if key.startswith(prefix))
        return [key.removeprefix(prefix) for key in found]

    def figure(self, name: str) -> Curve:
        """Batches that have a training figure, and its values; both may be empty."""
        known = [line for line in self.training if f"train/{name}" in line]
        return [line["batch"] for line in known], [line[f"train/{name}"] for line in known]

    def curve(self, name: str) -> Curve:
        """A training figure's `figure`, in at most `MOST_POINTS` points."""
        x, y = self.figure(name)
        size = max(1, math.ceil(len(x) / MOST_POINTS))
        starts = range(0, len(x), size)
        return (
            [x[min(s + size, len(x)) - 1] for s in starts],
            [mean(y[s : s + size]) for s in starts],
        )

    def recent(self, name: str, batches: int = 10) -> float | None:
        """Mean of a training figure over the last batches that have it."""
        return mean(self.figure(name)[1][-batches:])


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread_out(values: Sequence[T]) -> list[T]:
    """The values in the order last, first, middle, middles of the halves, and so on."""
    order, step = list(values[-1:]), len(values)
    while step >= 1:
        order += values[::step]
        step //= 2
    return list(dict.fromkeys(order))


def read_runs(given: Sequence[str]) -> list[Run]:
    """The runs of these folders; `NAME=FOLDER` names one.

    Raises:
        ConfigurationError: if a folder holds no run.
    """
    named = [_split(each) for each in given]
    folders = [folder for _, folder in named]
    for folder in folders:
        _check(folder)
    short = distinct_names(folders)
    return [
        Run(
            name=name or short[i],
            folder=folder,
            lines=list(whole_lines(folder / "metrics.jsonl", "batch", "step")),
        )
        for i, (name, folder) in enumerate(named)
    ]


def _split(given: str) -> tuple[str, Path]:
    if os.path.exists(given) or "=" not in given:  # pathlib raises if a name is too long
        return "", Path(given)
    name, _, folder = given.partition("=")
    return name, Path(folder)


def _check(folder: Path) -> None:
    if (folder / "metrics.jsonl").is_file():
        return
    inner = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))
    inner += sorted(str(path.parent) for path in folder.glob("*/*/metrics.jsonl"))
    hint = f"; did you mean {', '.join(inner[:4])}?" if inner else "; name the folder of a run"
    if not folder.is_dir():
        raise ConfigurationError(f"RUN: there is no folder {folder}")
    raise ConfigurationError(f"RUN: {folder} has no metrics.jsonl{hint}")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The part of each folder's path that distinguishes it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < 2:
        return ["/".join(parts[-2:]) for parts in paths]
    shortest = min(map(len, paths))
    start = next(i for i in range(shortest + 1) if len({parts[: i + 1] for parts in paths}) > 1)
    end = next(i for i in range(shortest + 1) if len({parts[-i - 1 :] for parts in paths}) > 1)
    return ["/".join(parts[start : len(parts) - end]) or parts[-1] for parts in paths]
