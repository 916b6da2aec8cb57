"""The state after the last finished batch, also while the next one is under way."""

import copy
from typing import Any

import lightning as L
from torch import Tensor

from scsdpo.private.lightning import (
    STEPPED,
    ProcessedTracker,
    count_stepped,
    loader_positions,
    validation_is_due,
)
from scsdpo.records import recorded
from scsdpo.state import all_remembered


class SafePoint:
    """What was after the last finished batch, but for weights and optimizer.

    A batch that is given up before its first optimizer step has changed neither: the checkpoint
    that `into` completes is then the one that was due after the batch before, and the questions
    are asked again.
    """

    def __init__(self) -> None:
        self.validated = -1
        """The batch after which validation was last gone through."""
        self.batch = self.step = -1
        """The last finished batch, and optimizer steps then; -1: training has not begun."""
        self.alone = False
        """Rank 0 saves while the others wait elsewhere, or are gone: without a collective."""
        self._buffers: dict[str, Tensor] = {}
        self._remembered: dict[str, dict[str, Any]] = {}
        self._metrics: dict[str, float] = {}
        self._loaders: Any = None

    @classmethod
    def of(cls, module: L.LightningModule) -> "SafePoint | None":
        """The one of a `PolicyOptimizer`; None: another module, which is not trained."""
        found = vars(module).get("safe_point")
        return found if isinstance(found, cls) else None

    def keep(self, module: L.LightningModule) -> None:
        """Take down what is now."""
        trainer = module.trainer
        self.batch, self.step = int(recorded(module).batches), trainer.global_step
        own = ((n, b) for n, b in module.named_buffers() if not n.startswith("policy."))
        self._buffers = {name: buffer.clone() for name, buffer in own}
        self._remembered = copy.deepcopy(all_remembered(module))
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._loaders = loader_positions(trainer)

    def place(self, module: L.LightningModule) -> tuple[int, int]:
        """The last finished batch, and the last one that a validation followed."""
        batch = self.batch if under_way(module.trainer) else int(recorded(module).batches)
        return batch, self.validated

    def is_whole(self, trainer: L.Trainer) -> bool:
        """Whether the weights are still those after the last finished batch."""
        return not under_way(trainer) or self.step == trainer.global_step

    def into(self, checkpoint: dict[str, Any], module: L.LightningModule) -> None:
        """Complete what Lightning saves: the loops, and all else, between two batches."""
        checkpoint["remembered"] = all_remembered(module)
        checkpoint["validated"] = self.validated
        if module.trainer.state.fn != "fit":
            return
        loops = checkpoint["loops"]["fit_loop"]
        if under_way(module.trainer):
            state = checkpoint["state_dict"]
            state.update({k: v for k, v in self._buffers.items() if k in state})
            checkpoint["remembered"] = self._remembered
            loops["state_dict"]["combined_loader"] = self._loaders
            if "metrics" in checkpoint:
                checkpoint["metrics"] = self._metrics
        batch, validated = self.place(module)
        _between_batches(loops, module.trainer, validated=batch == validated)


def count_batches(trainer: L.Trainer) -> None:
    """Loggers count batches; after a resume Lightning is off by one at times."""
    count_stepped(trainer, trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1)


def under_way(trainer: L.Trainer) -> bool:
    """Whether a batch was begun and not finished."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    assert isinstance(progress, ProcessedTracker)
    return progress.ready > progress.processed


def _between_batches(loops: dict[str, Any], trainer: L.Trainer, *, validated: bool) -> None:
    """Lightning's counters as they are after the last finished batch.

    Lightning itself counts an epoch that `max_steps` cuts short as complete, forgets where the data
    were after a complete one, skips a validation that was due and not done, and goes on amid one
    that was broken off.
    """
    batch = loops["epoch_loop.batch_progress"]
    for count in _counts(batch):
        count["ready"] = count["started"] = count["completed"] = count["processed"]
    finished = batch["current"]["processed"]
    pending = (
        bool(finished) and not validated and not under_way(trainer) and validation_is_due(trainer)
    )
    batch["is_last_batch"] = bool(finished) and finished >= trainer.num_training_batches
    if batch["is_last_batch"] and not pending:
        _end_epoch(loops)
    elif finished:
        for count in _counts(loops["epoch_progress"]):  # also if `max_steps` has cut it short
            count["processed"] = count["completed"] = count["started"] - 1
    # What Lightning takes for "amid an evaluation", of which nothing was done.
    validation = loops["epoch_loop.val_loop.batch_progress"]
    begun = {"ready": int(pending), "started": int(pending), "processed": 0, "completed": 0}
    validation |= {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
    stepped = max(batch["total"]["processed"] - 1, 0)
    loops["epoch_loop.state_dict"][STEPPED] = stepped


def _end_epoch(loops: dict[str, Any]) -> None:
    """The next epoch is ready: else Lightning would not restore where the data are."""
    for count in _counts(loops["epoch_progress"]):
        count["processed"] = count["completed"] = count["started"]
        count["ready"] = count["started"] + 1
    batch = loops["epoch_loop.batch_progress"]
    batch |= {"current": dict.fromkeys(batch["current"], 0), "is_last_batch": False}


def _counts(progress: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    return progress["total"], progress["current"]
