"""Keep the state after the last finished batch while the next one is being processed."""

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
    """The state after the last finished batch, without weights and optimizer.

    A batch that is abandoned before its first optimizer step has changed neither of them. The
    checkpoint that `into` completes is then that after the batch before, and a resumed run asks the
    questions again.
    """

    def __init__(self) -> None:
        self.validated = -1
        """The batch after which the last validation was completed."""
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
        """The safe point of a `PolicyOptimizer`; None: another module, which is not trained."""
        found = vars(module).get("safe_point")
        return found if isinstance(found, cls) else None

    def keep(self, module: L.LightningModule) -> None:
        """Keep the present state."""
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
        """True if the weights are still those after the last finished batch."""
        return not under_way(trainer) or self.step == trainer.global_step

    def into(self, checkpoint: dict[str, Any], module: L.LightningModule) -> None:
        """Complete Lightning's checkpoint: loops and other state, as between two batches."""
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
    """Set loggers' step to the number of batches; after a resume Lightning may be off by one."""
    count_stepped(trainer, trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1)


def under_way(trainer: L.Trainer) -> bool:
    """True if a batch was begun and not finished."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    assert isinstance(progress, ProcessedTracker)
    return progress.ready > progress.processed


def _between_batches(loops: dict[str, Any], trainer: L.Trainer, *, validated: bool) -> None:
    """Lightning's counters as they are after the last finished batch.

    Without this, Lightning counts an epoch that `max_steps` cuts short as complete, forgets the
    position in the data after a complete one, skips a validation that was due, and resumes within
    one that was interrupted.
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
        for count in _counts(loops["epoch_progress"]):  # also if `max_steps` cut it short
            count["processed"] = count["completed"] = count["started"] - 1
    # Lightning reads these counters as "within an evaluation", of which nothing was done.
    validation = loops["epoch_loop.val_loop.batch_progress"]
    begun = {"ready": int(pending), "started": int(pending), "processed": 0, "completed": 0}
    validation |= {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
    stepped = max(batch["total"]["processed"] - 1, 0)
    loops["epoch_loop.state_dict"][STEPPED] = stepped


def _end_epoch(loops: dict[str, Any]) -> None:
    """Mark the next epoch as ready: otherwise Lightning does not restore the data's position."""
    for count in _counts(loops["epoch_progress"]):
        count["processed"] = count["completed"] = count["started"]
        count["ready"] = count["started"] + 1
    batch = loops["epoch_loop.batch_progress"]
    batch |= {"current": dict.fromkeys(batch["current"], 0), "is_last_batch": False}


def _counts(progress: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    return progress["total"], progress["current"]
