"""Private names of Lightning, except those of its command line (`private/lightning_cli.py`)."""

import threading
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor

CHECKED = ">=2.6,<2.7"

ForkLauncher = _MultiProcessingLauncher
"""Class of `strategy.launcher` that starts ranks as copies of a process; no public name."""
ScriptLauncher = _SubprocessScriptLauncher
"""Class of `strategy.launcher` that runs the command line for each rank; no public name."""
ProcessedTracker = _ProcessedTracker
"""The class of a loop's `batch_progress.total` and `.current`, which count `processed`."""

INSTANTIATOR = "_instantiator"
"""Hyperparameter with the path of the function by which `load_from_checkpoint` builds a module."""
STEPPED = "_batches_that_stepped"
"""Key of the epoch loop's state with the step number of loggers."""


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """The module's trainer, or None; the public property raises if there is none."""
    return module._trainer


def cluster_environment(trainer: L.Trainer) -> ClusterEnvironment | None:
    """The cluster environment of the run (SLURM, a plain machine, ...); not all strategies have
    it.
    """
    return trainer._accelerator_connector.cluster_environment


def requeue_path(trainer: L.Trainer, folder: Any) -> str:
    """The name in `folder` of the next checkpoint that a requeued job resumes from."""
    return trainer._checkpoint_connector.hpc_save_path(folder)


def requeued_from(trainer: L.Trainer) -> str | None:
    """The checkpoint that a requeued job resumes from; None: there is none."""
    return trainer._checkpoint_connector._hpc_resume_path


def checkpoint_content(trainer: L.Trainer, weights_only: bool) -> dict[str, Any]:
    """The content that `trainer.save_checkpoint` writes; that function always writes it too."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def silence_signal_handlers(trainer: L.Trainer) -> None:
    """Keep the trainer from registering signal handlers; no argument turns them off."""
    trainer._signal_connector = _NoHandlers(trainer)


class _NoHandlers(_SignalConnector):
    def register_signal_handlers(self) -> None:
        """Register nothing."""


def disarm_child_observers() -> None:
    """Keep Lightning from killing this process 5 s after a rank that it started has failed."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def forget_writer(logger: TensorBoardLogger) -> None:
    """Let the next use of `logger.experiment`, which cannot be set, open another file."""
    logger._experiment = None


def shard_over(strategy: ModelParallelStrategy, ranks: int) -> None:
    """Shard over `ranks` ranks; the constructor needs the number before it is known."""
    strategy._data_parallel_size = ranks


# ---------------------------------------------------------------------- loops


def count_stepped(trainer: L.Trainer, batch: int) -> None:
    """Set the step number of loggers; its public property can only be read."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = batch


def loader_positions(trainer: L.Trainer) -> list[dict[str, Any]]:
    """Current states of the training data loaders; no public function returns them."""
    loader = trainer.fit_loop._combined_loader
    return loader._state_dicts() if loader is not None else []


def validation_is_due(trainer: L.Trainer) -> bool:
    """True if Lightning validates after the batch that was just finished."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


# ----------------------------------------------------------------- checkpoints


class BestStates(ModelCheckpoint, ABC):
    """`ModelCheckpoint` with public names for its steps with one checkpoint.

    `ModelCheckpoint` keeps its arguments in private fields, and its public methods both decide and
    write.
    """

    @property
    def seconds_between(self) -> float | None:
        """The argument `train_time_interval` in seconds."""
        interval = self._train_time_interval
        return None if interval is None else interval.total_seconds()

    @property
    def batches_between(self) -> int:
        """The argument `every_n_train_steps`; 0: never."""
        return self._every_n_train_steps

    def may_save(self, trainer: L.Trainer) -> bool:
        """True if the trainer is training and nothing was saved at this step."""
        return not self._should_skip_saving_checkpoint(trainer)

    def save_if_best(self, trainer: L.Trainer) -> None:
        """Save the state by `write_best`, if it is one of the best."""
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def note_saved(self, trainer: L.Trainer, filepath: str) -> None:
        """Remember that the state at this step is saved."""
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    @property
    def newest_best(self) -> str:
        """The path of the last `note_saved`; '': none."""
        return self._last_checkpoint_saved

    @abstractmethod
    def write_last(self, trainer: L.Trainer) -> None:
        """Write the last state; called if `save_last` is set."""
        super()._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @abstractmethod
    def write_best(self, trainer: L.Trainer, filepath: str) -> None:
        """Write one of the best states; called when it is due."""
        super()._save_checkpoint(trainer, filepath)

    def remove_worse(self, trainer: L.Trainer, filepath: str) -> None:
        """Remove a state that is no longer one of the best."""
        super()._remove_checkpoint(trainer, filepath)

    def _save_last_checkpoint(self, trainer: L.Trainer, candidates: dict[str, Tensor]) -> None:
        self.write_last(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.write_best(trainer, filepath)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.remove_worse(trainer, filepath)
