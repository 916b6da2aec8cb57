"""Configurations of runs: their parts, and their differences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scsdpo.report.reading import Run

PLACES = ("trainer.logger", "trainer.default_root_dir", "checkpoint.dirpath", "ckpt_path")
"""Keys of output folders and of the checkpoint, which do not distinguish methods."""
AXES = (
    "policy", "rollout", "teacher", "advantage", "weighting", "token_weighting", "selection",
    "reduction", "importance", "reference", "optimizer", "lr_scheduler",
)  # fmt: skip
"""Parts of the model, in the order of a step."""


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text; the value of an object is its class."""
    for key, value in config.items():
        here = f"{prefix}.{key}" if prefix else str(key)
        if key == "class_path" and prefix:
            yield prefix, short(str(value))
        elif isinstance(value, Mapping):
            yield from flat(value, prefix if key == "init_args" and prefix else here)
        else:
            yield here, str(short(value) if isinstance(value, str) else value)


def short(value: str) -> str:
    """`EMA` for `scsdpo.teacher.EMA`."""
    ours = value.startswith(("scsdpo.", "torch.", "lightning.")) and " " not in value
    return value.rpartition(".")[2] if ours else value


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys with different values, with the value in each run; "": the run lacks the key."""
    tables = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table if not key.startswith(PLACES))
    rows = [(key, [table.get(key, "") for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def parts(run: Run) -> list[tuple[str, str, str]]:
    """Name, class and settings (in one line) of each part of the model."""
    model = run.config.get("model") or {}
    rows = []
    for axis in AXES:
        if isinstance(value := model.get(axis), Mapping):
            table = dict(flat(value, axis))
            name = table.pop(axis, "")
            settings = [
                f"{key.removeprefix(f'{axis}.')} {' '.join(text.split())}"
                for key, text in table.items()
                if ".templates" not in key and text != "None"
            ]
            rows.append((axis, name, " · ".join(settings)))
    return rows
