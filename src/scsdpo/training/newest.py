"""From what a run that failed can go on."""

import zipfile
from pathlib import Path

import lightning as L

from scsdpo.checkpoints import Checkpoint


def newest_checkpoint(trainer: L.Trainer) -> Path | None:
    """The newest whole checkpoint in the run's folders; found without a collective or a load."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]
    found = [p for folder in folders if folder is not None for p in Path(folder).glob("*.ckpt")]
    return max(filter(_is_whole, found), key=lambda path: path.stat().st_mtime_ns, default=None)


def told(trainer: L.Trainer) -> str:
    """The same in words."""
    newest = newest_checkpoint(trainer)
    return f"the newest whole checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _is_whole(path: Path) -> bool:
    """What comes last is there: a file's table of contents, a folder's `meta.pt`."""
    return (path / "meta.pt").exists() if path.is_dir() else zipfile.is_zipfile(path)
