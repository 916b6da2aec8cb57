"""The folder of a run, and the start of its records."""

import shutil
from itertools import count
from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The folder in which Lightning puts `checkpoints/`; the same on every rank.

    With a logger `SAVE_DIR/NAME/VERSION`, of several the first one's; without one the trainer's
    `default_root_dir`.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version
    name = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / name


def runs_folder(trainer: L.Trainer) -> Path:
    """The folder in which the logger puts runs; without one, that of this run's checkpoints."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / "checkpoints"
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def begin_path(path: Path, batch: int, checkpoint: str | Path | None) -> None:
    """Prepare a record: a new run starts an empty one, a resumed run continues its own.

    Args:
        path: file or folder of the record. What another run left there becomes `NAME.1.SUFFIX`,
            `NAME.2.SUFFIX`, ...
        batch: number of the batch after which the run resumes.
        checkpoint: the checkpoint it resumes from; None: the run is new. If the run's folder is
            another one than the checkpoint's, the record is copied from there.
    """
    if batch == 0 and not checkpoint:
        if path.exists():
            names = (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
            path.rename(next(name for name in names if not name.exists()))
    elif checkpoint and not path.exists():
        before = Path(checkpoint).parent.parent / path.name
        if before.is_dir():
            shutil.copytree(before, path)
        elif before.exists():
            shutil.copyfile(before, path)
