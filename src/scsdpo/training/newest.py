"""From what a run that failed can go on."""

from pathlib import Path

import lightning as L

from scsdpo.checkpoints import Checkpoint, newest_whole


def newest_checkpoint(trainer: L.Trainer) -> Path | None:
    """The newest whole checkpoint in the run's folders; found without a collective or a load."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]
    return newest_whole(*(Path(folder) for folder in folders if folder is not None))


def told(trainer: L.Trainer) -> str:
    """The same in words."""
    newest = newest_checkpoint(trainer)
    return f"the newest whole checkpoint is {newest}" if newest else "there is no checkpoint yet"
