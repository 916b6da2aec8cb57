"""When a run saves, and under which names."""

import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from scsdpo.checkpoints.choosing import highest_number
from scsdpo.checkpoints.fully_sharded import FullySharded
from scsdpo.checkpoints.reading import NUMBER, number
from scsdpo.checkpoints.safe_point import SafePoint
from scsdpo.checkpoints.saving import disk_outage, everywhere
from scsdpo.checkpoints.saying import say
from scsdpo.checkpoints.shards import Background
from scsdpo.checkpoints.slurm import hand_over
from scsdpo.checkpoints.writing import (
    discard,
    install,
    is_remote,
    part_of,
    remove_parts,
    set_aside,
)
from scsdpo.distributed import all_max
from scsdpo.errors import ConfigurationError, first_line
from scsdpo.interrupt import Interrupted
from scsdpo.private.lightning import BestStates, checkpoint_content
from scsdpo.records import hold, run_folder, runs_folder

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_ABANDONED = 600.0
"""Seconds after which nobody can still be at a write."""


class Checkpoint(BestStates):
    """Lightning's `ModelCheckpoint`, and with `save_last` the last two states whatever is best.

    They are `last.ckpt` and `previous.ckpt`, and are written every so many minutes, at each
    validation and at the end. What is written is whole under its name, or not there; what another
    run has left in the folder under these names becomes `last.1.ckpt`, ...

    Args:
        every_minutes: time between two states, looked at after each batch; 0: after each batch,
            .inf: at validations only.
        **kwargs: of `ModelCheckpoint`, for the best states.

    Raises:
        ValueError: if `every_minutes` is negative.
    """

    def __init__(self, every_minutes: float = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not every_minutes >= 0:
            raise ValueError(
                f"`Checkpoint(every_minutes=...)` must be >= 0, got {every_minutes}; .inf: never"
            )
        own = self.seconds_between  # Lightning's way to say it
        self.every_seconds = own or 60 * every_minutes
        self.config: dict[str, Any] = {}
        """The run's configuration by section, if it is known; for a resume to compare."""
        self._place: tuple[int, int] | None = None
        """Batch, and last validated batch, of the last state that was saved."""
        self._time = time.monotonic()
        self._number = 0
        """Of the last checkpoint: each has a larger one than all before it, whatever the clock."""
        self._outage, self._written, self._refused = disk_outage(), True, ""
        self._under_way: tuple[Background, tuple[int, int]] | None = None
        """A write in the background, and the place it is of."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            # Nothing in there is overwritten.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and not is_remote(self._folder):
            run = run_folder(trainer)  # a logger's version may ask rank 0: everyone must ask
            inside = self._folder.absolute().is_relative_to(run.absolute())
            hold(trainer, run if inside else self._folder, needed=True)
        _refuse_other_shards(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In another folder than the checkpoint's, the best ones are counted anew."""
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)

    # -------------------------------------------------------------------- when

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._time = time.monotonic()
        if trainer.is_global_zero and not is_remote(self.dirpath or ""):
            folders = [self._folder, runs_folder(trainer)]
            self._outage.attempt(partial(remove_parts, self._folder), part=True)
            if trainer.ckpt_path is not None:  # in another folder, of a run that may be alive
                folders.append(Path(trainer.ckpt_path).parent)
                old = partial(remove_parts, folders[-1], untouched=_ABANDONED)
                self._outage.attempt(old, part=True)
            self._number = max(self._number, highest_number(folders))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Not Lightning's, which looks for states from before a manual optimizer step."""
        every = self.batches_between
        if every and self.may_save(trainer) and trainer.global_step % every == 0:
            self.save_if_best(trainer)
        self._finish(trainer, wait=False)
        due = time.monotonic() - self._time >= self.every_seconds
        if all_max(torch.tensor(float(due), device=pl_module.device)):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_last(trainer)
        self._finish(trainer)

    def unsaved(self, trainer: L.Trainer) -> str:
        """Why a run that has ended cannot go on from where it is; '' if it can.

        Its last state could not be written, or what was written is not there or cannot be read.
        Every rank has an answer, and rank 0's counts.
        """
        point = SafePoint.of(trainer.lightning_module)
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]
        if quick or point is None or point.batch < 0:
            return ""  # no batch was begun
        error = self._outage.error
        why = f": {first_line(error)}" if error else ""
        if self._due_place(trainer) is not None:
            return f"the state after batch {point.batch} is not saved{why}"
        if not self._written:
            return f"{self._refused} is not saved{why}"
        newest = self.last_model_path if self.save_last else self.newest_best
        if newest and not is_remote(newest) and number(Path(newest)) is None:
            return f"{newest} was saved, and cannot be read any more"
        return ""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the state after the last finished batch, if it is still there, and say where."""
        point = SafePoint.of(pl_module)  # None: a command that looks at a policy, saves nothing
        if point is None or point.batch < 0 or not self._may_save(trainer):
            return
        if isinstance(exception, Interrupted):  # on every rank
            self._save_last(trainer)
            self._finish(trainer)
            if self._place is not None and not is_remote(self.last_model_path):
                hand_over(trainer, self._folder / LAST, exception.signum)
        elif point.is_whole(trainer) and not _is_sharded(trainer):
            point.alone = True
            try:
                self._rescue(trainer)
            finally:
                point.alone = False
        if self._place is not None:
            say(f"the state after batch {self._place[0]} is in {self.last_model_path}")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint["metrics"] = metrics
        checkpoint["config"] = self.config
        self._number += 1
        checkpoint[NUMBER] = self._number

    # --------------------------------------------------------------------- how

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _may_save(self, trainer: L.Trainer) -> bool:
        quick = trainer.fast_dev_run  # type: ignore[attr-defined]
        return not quick and trainer.state.fn == "fit" and not trainer.sanity_checking

    def _due_place(self, trainer: L.Trainer) -> tuple[int, int] | None:
        """Where the run is, unless that is saved already."""
        module = trainer.lightning_module
        point = SafePoint.of(module)
        assert point is not None
        place = point.place(module)
        return place if self.save_last and place != self._place else None

    def _save_last(self, trainer: L.Trainer) -> None:
        if self._may_save(trainer):
            self._finish(trainer)
            self.write_last(trainer)

    def write_last(self, trainer: L.Trainer) -> None:
        """`last.ckpt`, unless it is this very state already."""
        if (place := self._due_place(trainer)) is None:
            return
        if self._place is None and self._is_another_runs(trainer):
            first = trainer.is_global_zero
            aside = partial(set_aside, self._folder, (LAST, PREVIOUS)) if first else lambda: None
            if not everywhere(self._outage, aside, part=True):
                return
        last = f"{self.dirpath}/{LAST}"
        strategy = trainer.strategy
        if isinstance(strategy, FullySharded) and strategy.background and not is_remote(last):
            self._begin(trainer, strategy, place)
        elif self._write(trainer, last, aside=self._folder / PREVIOUS):
            self.last_model_path, self._place = last, place
        self._time = time.monotonic()

    def _begin(self, trainer: L.Trainer, strategy: FullySharded, place: tuple[int, int]) -> None:
        """`last.ckpt` in the background."""
        content = checkpoint_content(trainer, self.save_weights_only)
        part, begun = part_of(self._folder / LAST), list[Background]()
        write = lambda: begun.append(strategy.begin_checkpoint(content, part))  # noqa: E731
        if everywhere(self._outage, write, part=True):
            self._under_way = begun[0], place
        elif trainer.is_global_zero:
            with suppress(OSError):
                discard(part)

    def _finish(self, trainer: L.Trainer, *, wait: bool = True) -> None:
        """Give what was written in the background its name, if there is any, or all are done."""
        if self._under_way is None:
            return
        write, place = self._under_way
        device = trainer.strategy.root_device
        if not wait and all_max(torch.tensor(float(not write.done()), device=device)):
            return
        self._under_way = None
        last, aside = self._folder / LAST, self._folder / PREVIOUS
        first = trainer.is_global_zero
        if self._named(trainer, lambda: write.finish(first=first), last, aside):
            self.last_model_path, self._place = f"{self.dirpath}/{LAST}", place

    def _rescue(self, trainer: L.Trainer) -> None:
        """`last.ckpt` by rank 0 alone: others may wait elsewhere, or be gone."""
        place = self._due_place(trainer)
        if place is None or not trainer.is_global_zero or is_remote(self.dirpath or ""):
            return
        part = part_of(self._folder / LAST)
        try:
            if self._place is None and self._is_another_runs(trainer):
                set_aside(self._folder, (LAST, PREVIOUS))
            content = checkpoint_content(trainer, self.save_weights_only)
            trainer.strategy.save_checkpoint(content, part)
            install(part, self._folder / LAST, self._folder / PREVIOUS)
        except (OSError, RuntimeError, ConfigurationError) as error:  # the failure itself is seen
            say(f"the state after batch {place[0]} could not be saved: {error}")
            return
        self.last_model_path = f"{self.dirpath}/{LAST}"
        self._place = place

    def _is_another_runs(self, trainer: L.Trainer) -> bool:
        """What is in the folder: not if this run goes on from there."""
        if is_remote(self.dirpath or ""):
            return False
        source = Path(trainer.ckpt_path or "/").resolve()
        return source.parent != self._folder.resolve()

    def write_best(self, trainer: L.Trainer, filepath: str) -> None:
        """One of the best."""
        self._written = self._write(trainer, filepath)
        if not self._written:
            self._refused = filepath
            return
        self.note_saved(trainer, filepath)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _write(self, trainer: L.Trainer, filepath: str, aside: Path | None = None) -> bool:
        """Whether it is there now: a disk that refuses costs this checkpoint, and not the run."""
        content = checkpoint_content(trainer, self.save_weights_only)
        if is_remote(filepath):
            return everywhere(
                self._outage, partial(trainer.strategy.save_checkpoint, content, filepath)
            )
        part = part_of(filepath)
        write = partial(trainer.strategy.save_checkpoint, content, part)
        return self._named(trainer, write, Path(filepath), aside)

    def _named(
        self, trainer: L.Trainer, write: Callable[[], None], path: Path, aside: Path | None
    ) -> bool:
        """Whether all could `write` their part, and it has its name now."""
        part, first = part_of(path), trainer.is_global_zero
        name = partial(install, part, path, aside) if first else lambda: None
        written = everywhere(self._outage, write, part=True) and everywhere(self._outage, name)
        if not written and first:
            with suppress(OSError):  # a disk that is read-only now
                discard(part)
        return written

    def remove_worse(self, trainer: L.Trainer, filepath: str) -> None:
        """An older one stays where the newer could not be written."""
        if self._written:
            with suppress(OSError):  # it is not in the way
                super().remove_worse(trainer, filepath)


def _refuse_other_shards(trainer: L.Trainer) -> None:
    """Lightning's own strategy loses what strategies remember when it reads a checkpoint."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullySharded):
        raise ConfigurationError(
            f"trainer.strategy: {type(strategy).__name__} has checkpoints of another kind; use "
            "scsdpo.checkpoints.FullySharded, which takes no sizes"
        )


def _is_sharded(trainer: L.Trainer) -> bool:
    """Whether to save takes all ranks."""
    return isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
