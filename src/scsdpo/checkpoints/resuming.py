"""What a run takes back from a checkpoint beside weights and the optimizer's state."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from scsdpo.checkpoints.comparing import Change
from scsdpo.checkpoints.saying import say
from scsdpo.checkpoints.writing import WholeFiles
from scsdpo.state import remember_all


def write_whole_files(trainer: L.Trainer, *, resumes: bool) -> None:
    """Checkpoints are whole or not there, whoever writes them.

    Args:
        trainer: its strategy's writer is replaced, unless it is one of the user's own.
        resumes: whether a checkpoint is read to go on from it.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles(resumes=resumes)


def take_back(
    module: nn.Module,
    checkpoint: dict[str, Any],
    changed: Sequence[Change],
    renewed: Callable[[], tuple[torch.optim.Optimizer, Any]],
) -> None:
    """Give strategies what they remembered, as far as it is still of the same kind.

    Args:
        module: has the strategies.
        checkpoint: read by Lightning, which takes optimizer and schedule out of it afterwards.
        changed: what the configuration has changed since.
        renewed: makes an optimizer of one parameter and its schedule, as configured now; where
            their arguments have changed, their learning rates replace those in the checkpoint.

    Raises:
        ValueError: if what was remembered belongs to other strategies.
    """
    if any(change.of_schedule for change in changed):
        _renew_schedule(checkpoint, *renewed())
    if not any(change.of_memory for change in changed):
        remember_all(module, checkpoint["remembered"])
    elif checkpoint["remembered"]:
        keys = ", ".join(change.key for change in changed if change.of_memory)
        say(f"the memory of strategies, such as pass rates, is reset, because of a change: {keys}")


def _renew_schedule(
    checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, schedule: Any
) -> None:
    """Put the configuration's learning rates in, after as many steps as were taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()"
        if not isinstance(schedule, ReduceLROnPlateau):  # which goes by figures, from now on
            for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
                schedule.step()
    (settings,) = optimizer.state_dict()["param_groups"]
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group.update({key: value for key, value in settings.items() if key != "params"})
    checkpoint["lr_schedulers"] = [schedule.state_dict()]
