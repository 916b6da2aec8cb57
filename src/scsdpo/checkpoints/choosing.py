"""Which checkpoint a run goes on from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scsdpo.checkpoints.comparing import Rule, changes
from scsdpo.checkpoints.reading import Saved, number
from scsdpo.checkpoints.saying import say

_MOST = 8
"""Candidates that an error lists."""
_FIRM = (Rule.REFUSE, Rule.WARN)


def newest(folder: Path, config: Mapping[str, Any], *, whole_run: bool) -> Saved:
    """The newest whole checkpoint under a folder of runs that agrees with a configuration.

    Newest by the number that it holds, for clocks are set back. Those that are torn are passed
    over, and named.

    Args:
        folder: holds runs, or is one.
        config: by section.
        whole_run: data and method must agree too, and training must be able to go on from it.

    Raises:
        ValueError: listing the candidates.
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
            f"there is no whole checkpoint under {folder}; leave --ckpt_path out to begin a new run"
        )
    more = f", and {len(against) - _MOST} more" if len(against) > _MOST else ""
    raise ValueError(
        f"every checkpoint under {folder} is of another configuration: "
        f"{'; '.join(against[:_MOST])}{more}. Set the keys back to go on from one, or `scsdpo "
        "export` it and name the folder in model.policy.name_or_path to start from its weights"
    )


def usable_neighbour(path: Path) -> Path | None:
    """The newest checkpoint of `scsdpo fit` in the folder of one that cannot be used."""
    for other in _newest_first(path.parent.glob("*.ckpt")):
        try:
            return Saved.read(other).path
        except ValueError:
            continue
    return None


def newest_whole(*folders: Path) -> Path | None:
    """The newest whole checkpoint in some folders, whoever wrote it; no tensor is read."""
    found = (path for folder in folders for path in folder.glob("*.ckpt"))
    return next(iter(_newest_first(found)), None)


def highest_number(folders: Iterable[Path]) -> int:
    """Of all checkpoints under some folders; 0 if there are none."""
    paths = {path.resolve() for folder in folders for path in folder.rglob("*.ckpt")}
    return max((number(path) or 0 for path in paths), default=0)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Those that are whole."""
    found = [(path, found) for path in paths if (found := number(path)) is not None]
    return [path for path, _ in sorted(found, key=lambda each: _age(*each))]


def _age(path: Path, number: int) -> tuple[int, int]:
    """Smaller for what is newer; the time of the file decides where older versions wrote it."""
    return -number, -path.stat().st_mtime_ns


def _objection(saved: Saved, config: Mapping[str, Any], *, whole_run: bool) -> str | None:
    if whole_run and not saved.resumable:
        return "weights only"
    rules = _FIRM if whole_run else (Rule.REFUSE,)
    odd = [change for change in changes(saved.config, config) if change.rule in rules]
    if not whole_run:
        odd = [change for change in odd if change.key != "model.optimizer"]
    return str(odd[0]) if odd else None
