"""`--ckpt_path`: what it names, whether it can be used, and what has changed since."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment

from scsdpo.checkpoints import Change, Rule, Saved, changes, newest, say, usable_neighbour
from scsdpo.errors import ConfigurationError, blamed_on
from scsdpo.private.lightning import requeued_from
from scsdpo.records import runs_folder


def resolved(
    given: str | None, trainer: L.Trainer, config: Mapping[str, Any], command: str
) -> Saved | None:
    """The checkpoint that a command loads; None: it loads none.

    Args:
        given: a path, `last`, or nothing; then a job that SLURM has requeued goes on.
        trainer: knows where runs are.
        config: of the command, by section.
        command: `fit` goes on from it; others take the policy alone.

    Raises:
        ConfigurationError: if there is none, or it cannot be used.
    """
    fit = command == "fit"
    if given is None:
        requeued = requeued_from(trainer) if fit and SLURMEnvironment.detect() else None
        if requeued is None:
            return None
        given = str(Path(requeued).resolve())
    with blamed_on("ckpt_path"):
        if given == "last":
            return newest(runs_folder(trainer), config, whole_run=fit)
        if given in ("best", "hpc", "registry"):
            raise ValueError(f"must be `last` or a path, got {given}")
        return _whole(Path(given), resumable=fit)


def compared(saved: Saved, config: Mapping[str, Any], command: str) -> Sequence[Change]:
    """What has changed since; said in one line each.

    Raises:
        ConfigurationError: if something cannot change.
    """
    found = changes(saved.config, config)
    if command != "fit":
        found = [change for change in found if change.key.startswith("model.policy")]
    refused = [change for change in found if change.rule is Rule.REFUSE]
    if refused:
        raise ConfigurationError(
            f"{'; '.join(map(str, refused))}: cannot change after {saved.path} was written; "
            "set it back, or begin a new run"
        )
    for change in found:
        assert change.rule is not None
        warning = "warning: " if change.rule is Rule.WARN else ""
        say(f"{warning}{change}: {change.rule.value}")
    return found


def _whole(path: Path, *, resumable: bool) -> Saved:
    try:
        saved = Saved.read(path)
    except ValueError as error:
        runs = path.is_dir() and path.suffix != ".ckpt"
        other = usable_neighbour(path) if path.parent.is_dir() and not runs else None
        hint = f"; {other} is whole" if other is not None else ""
        raise ValueError(f"{error}{hint}") from error
    if resumable and not saved.resumable:
        raise ValueError(
            f"{path} holds weights only, training cannot go on from it: `scsdpo export` it, and "
            "name the folder in model.policy.name_or_path"
        )
    return saved
