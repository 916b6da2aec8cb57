"""Write checkpoints, files and folders, atomically: under its name a checkpoint is complete."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from scsdpo.checkpoints import read_back, shards

PART = ".part"
"""Suffix of a file or folder that is being written."""


def part_of(path: Path | str) -> Path:
    """The path at which `path` is written first: in the same folder, so on the same file system,
    where a rename is atomic.
    """
    return Path(f"{path}{PART}")


def is_remote(path: Path | str) -> bool:
    """True for a URL, which fsspec writes."""
    return "://" in str(path)


class WholeFiles(TorchCheckpointIO):
    """Writes beside the target, reads back, syncs to disk, and renames; reads folders too.

    Lightning's own writer goes through memory and TMPDIR, and copies from there onto the target.

    Args:
        resumes: True if training resumes from the checkpoints read; else the optimizer's states in
            a folder are not read.
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
        named = target.suffix == PART  # the caller will rename it
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
    """Rename a complete `part` to `path`; the old `path` is renamed to `aside` or removed.

    At every moment `path` or `aside` is complete; for files, `path` always is.
    """
    _sync(part)
    folders = path.is_dir() or part.is_dir()
    if aside is None or not path.exists():
        if folders:
            discard(path)
    elif folders:
        discard(aside)
        path.rename(aside)  # a folder cannot have a second name
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
    except OSError:  # without hard links `path` is missing for a moment
        path.rename(second)
    second.replace(aside)


def remove_parts(folder: Path, *, untouched: float = 0.0) -> None:
    """Remove the remains of killed writes.

    Args:
        folder: of checkpoints.
        untouched: remove only what has not changed for so many seconds; for folders of live runs.
    """
    for part in folder.glob(f"*{PART}"):
        last_write = max(each.stat().st_mtime for each in (part, *part.rglob("*")))
        if time.time() - last_write >= untouched:
            discard(part)


def set_aside(folder: Path, names: tuple[str, ...]) -> None:
    """Rename another run's checkpoints of these names: `last.ckpt` becomes `last.1.ckpt`."""
    taken = [folder / name for name in names if (folder / name).exists()]
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in taken):
        number += 1
    for path in taken:
        path.rename(path.with_suffix(f".{number}{path.suffix}"))


def discard(path: Path) -> None:
    """Remove a checkpoint; a folder is renamed first, because its files are removed one by one."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix != PART:
        named, path = path, part_of(path.with_name(f"{path.name}.old"))
        if path.exists():  # left by a killed process
            shutil.rmtree(path)
        named.rename(path)
    shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Flush a file, or a folder with its files, to the disk."""
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync_entry(inner)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
