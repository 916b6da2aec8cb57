"""A LightningModule that can be stopped at any batch and goes on with the next."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from scsdpo.checkpoints.comparing import Change
from scsdpo.checkpoints.safe_point import SafePoint
from scsdpo.checkpoints.saying import say
from scsdpo.checkpoints.writing import WholeFiles
from scsdpo.records import Recorded
from scsdpo.state import remember_all


class Resumable(Recorded):
    """Knows its state after the last finished batch, and puts that into every checkpoint."""

    optimizer: Callable[..., torch.optim.Optimizer]
    lr_scheduler: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.safe_point = SafePoint()
        self.changed: Sequence[Change] = ()
        """What the configuration has changed since the checkpoint that will be loaded."""
        self.policy_only = False
        """Whether a checkpoint is loaded for its policy, and not to go on from it."""

    def setup(self, stage: str) -> None:
        """Checkpoints are whole or not there, whoever writes them."""
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFiles(resumes=stage == "fit")

    def on_train_start(self) -> None:
        """Before the first batch."""
        self.safe_point.keep(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Loggers count batches; after a resume Lightning is off by one at times."""
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.batch_progress.total.ready - 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is finished."""
        self.safe_point.keep(self)

    def on_validation_epoch_end(self) -> None:
        """The validation after this batch was gone through; its figures are there."""
        if not self.trainer.sanity_checking:
            self.safe_point.validated = int(self.batches)

    def on_validation_end(self) -> None:
        """Its figures are those of the last finished batch now."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.safe_point.keep(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What strategies remember beyond buffers, and where the run is, in this one place."""
        self.safe_point.into(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back, as far as it is still of the same kind."""
        if self.policy_only:
            return
        self.safe_point.validated = checkpoint.get("validated", -1)
        if any(change.of_schedule for change in self.changed):
            self._renew_schedule(checkpoint)
        if not any(change.of_memory for change in self.changed):
            remember_all(self, checkpoint["remembered"])
        elif checkpoint["remembered"]:
            say("what strategies remembered of questions starts anew")

    def _renew_schedule(self, checkpoint: dict[str, Any]) -> None:
        """Put the configuration's learning rates in, after as many steps as were taken."""
        one = nn.Parameter(torch.zeros(1))
        optimizer = self.optimizer([one])
        schedule = self.lr_scheduler(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "step() before optimizer.step()"
            if not isinstance(schedule, ReduceLROnPlateau):  # which goes by figures, from now on
                for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
                    schedule.step()
        (settings,) = optimizer.state_dict()["param_groups"]
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group.update({key: value for key, value in settings.items() if key != "params"})
        checkpoint["lr_schedulers"] = [schedule.state_dict()]
