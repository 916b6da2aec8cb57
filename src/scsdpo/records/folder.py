"""Where the files of a run are."""

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
