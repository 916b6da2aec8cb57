"""Checkpoints: how runs write them, and how other commands read them."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from scsdpo.training.saving import disk_outage, save_unless_disk_fails


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, whose `last.ckpt` is the last state, with the last metrics.

    Lightning writes `last.ckpt` only together with a new best one, and leaves out the steps after
    the last validation.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._outage = disk_outage()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer, self._due(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer, self._due(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer, True)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint["metrics"] = metrics

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """A disk that fails costs this checkpoint, and not the run."""
        only = self.save_weights_only
        self._written = save_unless_disk_fails(
            trainer, filepath, weights_only=only, outage=self._outage
        )
        if not self._written:
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """An older one stays where the newer could not be written."""
        if self._written:
            super()._remove_checkpoint(trainer, filepath)

    def _due(self, trainer: L.Trainer) -> bool:
        every = self.every_n_epochs or 0
        return every > 0 and (trainer.current_epoch + 1) % every == 0

    def _save_last(self, trainer: L.Trainer, due: bool) -> None:
        if self.save_last and due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint of `scsdpo fit` holds, read without running anything of it."""

    path: Path
    model: dict[str, Any]
    """The configuration's section `model`."""
    weights: dict[str, Tensor]
    """The module's state, memory-mapped."""
    metrics: dict[str, float]
    """The last ones that were logged; none in a checkpoint of weights only."""
    step: int
    """Optimizer steps taken."""

    @classmethod
    def read(cls, path: Path) -> "Saved":
        """Read a checkpoint file.

        Raises:
            ValueError: if there is none, it is sharded, or it was not written by `scsdpo fit`.
        """
        if (path / "meta.pt").exists():
            raise ValueError(
                f"{path} is a sharded checkpoint; make it one file with "
                f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
            )
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            model = {k: v for k, v in content["hyper_parameters"].items() if k != "_instantiator"}
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{path} is not a checkpoint of `scsdpo fit`") from error
        return cls(
            path=path,
            model=model,
            weights=content["state_dict"],
            metrics=content.get("metrics", {}),
            step=content["global_step"],
        )
