"""Saving that a disk's fault does not end a run for."""

from pathlib import Path

import lightning as L
import torch

from scsdpo.distributed import all_max
from scsdpo.records import Outage


def disk_outage() -> Outage:
    """Of a run's checkpoints; torch's writer raises a RuntimeError where a disk is full."""
    return Outage("saving a checkpoint", (OSError, RuntimeError))


def save_unless_disk_fails(
    trainer: L.Trainer, path: Path | str, *, weights_only: bool, outage: Outage
) -> bool:
    """`Trainer.save_checkpoint`; whether it was written, the same on every rank.

    A full disk or a folder that is gone is said once and tried again with the next checkpoint; a
    state that must not be saved raises as ever.

    Args:
        trainer: all ranks come here.
        path: file or folder.
        weights_only: leave out what a resumed run needs.
        outage: of this run's checkpoints.
    """
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    done = outage.attempt(lambda: trainer.strategy.save_checkpoint(content, path))
    # In the place of Lightning's barrier, which a rank that failed would not come to.
    return not bool(all_max(torch.tensor(float(not done))))
