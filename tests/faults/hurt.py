"""What is left of a hurt run."""

from pathlib import Path

from scsdpo.checkpoints import newest_whole


def newest(run):
    """The newest whole checkpoint of a trainer's run."""
    return newest_whole(Path(run.checkpoint_callback.dirpath))
