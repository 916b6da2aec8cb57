"""Checkpoints on disk, files and folders: whole under their name, or not there."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from scsdpo.checkpoints import read_back, shards

PART = ".part"
"""Ending of what is being written; such a thing is nobody's checkpoint."""


def part_of(path: Path | str) -> Path:
    """Where `path` is written before it has its name: in the same folder, so that one rename is
    enough, whatever else is mounted where.
    """
    return Path(f"{path}{PART}")


def is_remote(path: Path | str) -> bool:
    """Whether it is a URL, which fsspec writes in its own way."""
    return "://" in str(path)


class WholeFiles(TorchCheckpointIO):
    """Writes beside the target, reads back, reaches the disk, and renames; reads folders too.

    Lightning's own goes through memory and TMPDIR, and copies from there onto the target.

    Args:
        resumes: whether training goes on from what is read; else the optimizer's states in a
            folder are left there.
    """

    def __init__(self, *, resumes: bool = True) -> None:
        super().__init__()
        self.resumes = resumes

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None
    ) -> None:
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        named = target.suffix == PART  # whoever asked for a part gives it its name
        part = target if named else part_of(target)
        part.parent.mkdir(parents=True, exist_ok=True)
        read_back.save(checkpoint, part)
        if not named:
            install(part, target)

    def load_checkpoint(
        self, path: Path | str, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not is_remote(path) and shards.is_folder(Path(path)):
            return shards.read(Path(path), optimizer=self.resumes)
        where = {} if map_location is None else {"map_location": map_location}
        return super().load_checkpoint(path, weights_only=weights_only, **where)

    def remove_checkpoint(self, path: Path | str) -> None:
        if is_remote(path):
            super().remove_checkpoint(path)
        else:
            discard(Path(path))


def install(part: Path, path: Path, aside: Path | None = None) -> None:
    """Give a whole `part` its name; what had it becomes `aside`, or goes.

    At every moment one of `path` and `aside` is whole, and with files `path` is.
    """
    _sync(part)
    folders = path.is_dir() or part.is_dir()
    if aside is None or not path.exists():
        if folders:
            discard(path)
    elif folders:
        discard(aside)
        path.rename(aside)  # a folder has one name only
    else:
        if aside.is_dir():
            discard(aside)
        _second_name(path, aside)
    part.replace(path)
    _sync_entry(path.parent)


def _second_name(path: Path, aside: Path) -> None:
    second = part_of(aside)
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # some file systems have no links; there `path` is gone for a moment
        path.rename(second)
    second.replace(aside)


def remove_parts(folder: Path, *, untouched: float = 0.0) -> None:
    """Remove what killed writes have left.

    Args:
        folder: of checkpoints.
        untouched: seconds for which nobody wrote there; in the folder of a run that may be alive.
    """
    for part in folder.glob(f"*{PART}"):
        if time.time() - _touched(part) >= untouched:
            discard(part)


def set_aside(folder: Path, names: tuple[str, ...]) -> None:
    """Give names free that another run's checkpoints have: `last.ckpt` becomes `last.1.ckpt`."""
    taken = [folder / name for name in names if (folder / name).exists()]
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in taken):
        number += 1
    for path in taken:
        path.rename(path.with_suffix(f".{number}{path.suffix}"))


def discard(path: Path) -> None:
    """Remove a checkpoint; a folder loses its name first, for it goes file by file."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix != PART:
        named, path = path, part_of(path.with_name(f"{path.name}.old"))
        if path.exists():  # a kill has left it
            shutil.rmtree(path)
        named.rename(path)
    shutil.rmtree(path)


def _touched(path: Path) -> float:
    """When something was last written there; a folder does not notice what grows in it."""
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")))


def _sync(path: Path) -> None:
    """Until the disk has it, with all that is in it."""
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync_entry(inner)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
