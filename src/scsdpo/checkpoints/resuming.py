"""Restore a run's other state from a checkpoint, beside weights and optimizer."""

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
    """Let the Trainer's strategy write checkpoints atomically.

    Args:
        trainer: its strategy's writer is replaced, unless the user has set one.
        resumes: True if the run reads a checkpoint to resume from it.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles(resumes=resumes)


def take_back(
    module: nn.Module,
    checkpoint: dict[str, Any],
    changed: Sequence[Change],
    renewed: Callable[[], tuple[torch.optim.Optimizer, Any]],
) -> None:
    """Restore the states of strategies, unless their classes have changed.

    Args:
        module: owns the strategies.
        checkpoint: Lightning's dictionary, from which it loads optimizer and schedule afterwards.
        changed: changes of the configuration since.
        renewed: makes an optimizer of one parameter and its schedule, as configured now. If their
            arguments have changed, their learning rates replace those in the checkpoint.

    Raises:
        ValueError: if the saved states belong to other strategies.
    """
    if any(change.of_schedule for change in changed):
        _renew_schedule(checkpoint, *renewed())
    if not any(change.of_memory for change in changed):
        remember_all(module, checkpoint["remembered"])
    elif checkpoint["remembered"]:
        keys = ", ".join(change.key for change in changed if change.of_memory)
        say(
            f"saved states such as running pass rates are reset, because these keys changed: {keys}"
        )


def _renew_schedule(
    checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, schedule: Any
) -> None:
    """Replace learning rates by the configuration's, after as many steps as were taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()"
        if not isinstance(schedule, ReduceLROnPlateau):  # it follows a metric, not steps
            for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
                schedule.step()
    (settings,) = optimizer.state_dict()["param_groups"]
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group.update({key: value for key, value in settings.items() if key != "params"})
    checkpoint["lr_schedulers"] = [schedule.state_dict()]
