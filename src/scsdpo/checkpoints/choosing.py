"""Choose the checkpoint from which a run is resumed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scsdpo.checkpoints.comparing import Consequence, changes
from scsdpo.checkpoints.reading import Saved, number
from scsdpo.checkpoints.saying import say

_MOST = 8
"""Number of candidates that an error lists."""
_FIRM = (Consequence.REFUSE, Consequence.WARN)


def newest(folder: Path, config: Mapping[str, Any], *, whole_run: bool) -> Saved:
    """The newest complete checkpoint under a folder of runs that fits a configuration.

    The number that it holds decides, because clocks may be set back. Torn checkpoints are skipped
    and reported.

    Args:
        folder: folder of runs, or of one run.
        config: configuration by section.
        whole_run: data and method must agree too, and training must be able to resume from it.

    Raises:
        ValueError: if there is none; lists the candidates.
    """
    found = []
    for path in folder.rglob("*.ckpt"):
        try:
            found.append(Saved.read(path))
        except ValueError as error:
            say(f"checkpoint skipped: {error}")
    against = []
    for saved in sorted(found, key=lambda saved: _age(saved.path, saved.number)):
        if (why := _objection(saved, config, whole_run=whole_run)) is None:
            return saved
        against.append(f"{saved.path} ({why})")
    if not against:
        raise ValueError(
            f"there is no complete checkpoint under {folder}; leave --ckpt_path out to begin a new "
            "run"
        )
    more = f", and {len(against) - _MOST} more" if len(against) > _MOST else ""
    raise ValueError(
        f"every checkpoint under {folder} is of another configuration: "
        f"{'; '.join(against[:_MOST])}{more}. Set the keys back to go on from one, or `scsdpo "
        "export` it and name the folder in model.policy.name_or_path to start from its weights"
    )


def usable_neighbour(path: Path) -> Path | None:
    """The newest usable checkpoint of `scsdpo fit` beside one that cannot be used."""
    for other in _newest_first(path.parent.glob("*.ckpt")):
        try:
            return Saved.read(other).path
        except ValueError:
            continue
    return None


def newest_whole(*folders: Path) -> Path | None:
    """The newest complete checkpoint in some folders, of any program; reads no tensor."""
    found = (path for folder in folders for path in folder.glob("*.ckpt"))
    return next(iter(_newest_first(found)), None)


def highest_number(folders: Iterable[Path]) -> int:
    """The highest `Saved.number` of all checkpoints under some folders; 0: there are none."""
    paths = {path.resolve() for folder in folders for path in folder.rglob("*.ckpt")}
    return max((number(path) or 0 for path in paths), default=0)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """The complete checkpoints among `paths`, newest first."""
    found = [(path, found) for path in paths if (found := number(path)) is not None]
    return [path for path, _ in sorted(found, key=lambda each: _age(*each))]


def _age(path: Path, number: int) -> tuple[int, int]:
    """Sort key, smaller for newer ones; without a number the file's time decides."""
    return -number, -path.stat().st_mtime_ns


def _objection(saved: Saved, config: Mapping[str, Any], *, whole_run: bool) -> str | None:
    if whole_run and not saved.resumable:
        return "weights only"
    refused = _FIRM if whole_run else (Consequence.REFUSE,)
    odd = [change for change in changes(saved.config, config) if change.consequence in refused]
    if not whole_run:
        odd = [change for change in odd if change.key != "model.optimizer"]
    return str(odd[0]) if odd else None
