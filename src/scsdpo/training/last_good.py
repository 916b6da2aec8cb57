"""What is left after a failure: the last good state is saved where it can be, and said."""

import zipfile
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from scsdpo.errors import first_line
from scsdpo.training.budget import is_sharded
from scsdpo.training.finite import spoiled

NAME = "last_good.ckpt"


def newest_checkpoint(trainer: L.Trainer) -> Path | None:
    """The newest whole checkpoint of the run, a file or a folder of shards; read, not loaded."""
    found = [path for folder in _folders(trainer) for path in folder.glob("*.ckpt")]
    whole = [path for path in found if _is_whole(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def told(trainer: L.Trainer) -> str:
    """From what to go on, in words."""
    newest = newest_checkpoint(trainer)
    return f"the newest whole checkpoint is {newest}" if newest else "there is no checkpoint yet"


def save_last_good(trainer: L.Trainer, *, whole: bool) -> None:
    """Save the state in memory as `last_good.ckpt` and say so, or say what is there instead.

    Starts no collective, for other ranks may be gone: rank 0 writes, and nobody writes shards.

    Args:
        trainer: whose run failed.
        whole: False if the batch under way has moved the weights.
    """
    module = trainer.lightning_module
    folder = next(iter(_folders(trainer)), None)
    if folder is None or not trainer.is_global_zero:
        return
    reason = "" if whole else "the batch under way has moved the weights"
    if is_sharded(module):
        reason = "its shards lie on several ranks"
    reason = reason or spoiled(module.named_parameters())
    if reason:
        rank_zero_info(f"the state in memory is not saved ({reason}); {told(trainer)}")
        return
    path = folder / NAME
    try:
        # `Trainer.save_checkpoint` without its barrier.
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.save_checkpoint(state, path)
    except Exception as error:  # whatever it is, the failure that came first must be told
        rank_zero_info(
            f"the last good state could not be saved ({first_line(error)}); {told(trainer)}"
        )
    else:
        rank_zero_info(f"the last good state, after step {trainer.global_step}, is saved: {path}")


def _folders(trainer: L.Trainer) -> list[Path]:
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return [Path(c.dirpath) for c in callbacks if c.dirpath is not None]


def _is_whole(path: Path) -> bool:
    """A torn file lacks the zip's directory, which comes last."""
    if path.is_dir():
        return (path / "meta.pt").exists() and (path / ".metadata").exists()
    return zipfile.is_zipfile(path)
