"""The callback that saves a run's checkpoints, and their names."""

import os
import signal
import subprocess
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
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from scsdpo.checkpoints.choosing import highest_number
from scsdpo.checkpoints.fully_sharded import FullySharded
from scsdpo.checkpoints.reading import NUMBER, number
from scsdpo.checkpoints.safe_point import SafePoint
from scsdpo.checkpoints.saying import say
from scsdpo.checkpoints.shards import Background
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
from scsdpo.private.lightning import (
    BestStates,
    checkpoint_content,
    cluster_environment,
    requeue_path,
)
from scsdpo.records import Outage, hold, run_folder, runs_folder

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_ABANDONED = 600.0
"""Seconds without a change after which a partial file counts as abandoned."""


class Checkpoint(BestStates):
    """Lightning's `ModelCheckpoint`; with `save_last` it also keeps the last two states.

    They are `last.ckpt` and `previous.ckpt`, written every `every_minutes`, at each validation and
    at the end. Files are written atomically: a file under its name is complete. Files of these
    names that another run left in the folder become `last.1.ckpt`, ...

    Args:
        every_minutes: minutes between two states, checked after each batch; 0: after each batch,
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
        own = self.seconds_between  # in Lightning's argument
        self.every_seconds = own or 60 * every_minutes
        self.config: dict[str, Any] = {}
        """The run's configuration by section, for comparison by a resumed run; empty: unknown."""
        self._place: tuple[int, int] | None = None
        """Batch, and last validated batch, of the last state that was saved."""
        self._time = time.monotonic()
        self._number = 0
        """Number of the last checkpoint. Numbers increase, also if the clock is set back."""
        # torch's writer raises a RuntimeError where a disk is full.
        self._outage = Outage("saving a checkpoint", (OSError, RuntimeError))
        self._written, self._refused = True, ""
        self._under_way: tuple[Background, tuple[int, int]] | None = None
        """A write in the background, and its (batch, last validated batch)."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            # No file of another run is overwritten, so the warning is void.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and not is_remote(self._folder):
            run = run_folder(trainer)  # a logger's version may be a broadcast: all ranks must call
            inside = self._folder.absolute().is_relative_to(run.absolute())
            hold(trainer, run if inside else self._folder, needed=True)
        _refuse_other_shards(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; in another folder than the checkpoint's, best states start anew."""
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)

    # -------------------------------------------------------------------- when

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._time = time.monotonic()
        if trainer.is_global_zero and not is_remote(self.dirpath or ""):
            folders = [self._folder, runs_folder(trainer)]
            self._outage.attempt(partial(remove_parts, self._folder), part=True)
            if trainer.ckpt_path is not None:  # its folder may belong to a run that is still alive
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
        """Save if due. Lightning's hook is not called: it expects a state before a manual step."""
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
        """Why an ended run cannot be resumed from its last state; '': it can.

        The last state could not be written, or its file is missing or unreadable. Every rank
        computes an answer, and rank 0's counts.
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
            return f"{newest} was saved, but cannot be read any more"
        return ""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the state after the last finished batch, if it still exists, and log where."""
        point = SafePoint.of(pl_module)  # None: a command that does not train
        if point is None or point.batch < 0 or not self._may_save(trainer):
            return
        if isinstance(exception, Interrupted):  # on every rank
            self._save_last(trainer)
            self._finish(trainer)
            if self._place is not None and not is_remote(self.last_model_path):
                _hand_over(trainer, self._folder / LAST, exception.signum)
        elif point.is_whole(trainer) and not isinstance(
            trainer.strategy,
            FSDPStrategy | ModelParallelStrategy,  # saving shards needs all ranks
        ):
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
        """The present (batch, last validated batch), unless that state is saved already."""
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
        """Write `last.ckpt`, unless it holds this state already."""
        if (place := self._due_place(trainer)) is None:
            return
        if self._place is None and self._is_another_runs(trainer):
            first = trainer.is_global_zero
            aside = partial(set_aside, self._folder, (LAST, PREVIOUS)) if first else lambda: None
            if not _on_all_ranks(self._outage, aside, part=True):
                return
        last = f"{self.dirpath}/{LAST}"
        strategy = trainer.strategy
        if isinstance(strategy, FullySharded) and strategy.background and not is_remote(last):
            self._begin(trainer, strategy, place)
        elif self._write(trainer, last, aside=self._folder / PREVIOUS):
            self.last_model_path, self._place = last, place
        self._time = time.monotonic()

    def _begin(self, trainer: L.Trainer, strategy: FullySharded, place: tuple[int, int]) -> None:
        """Begin to write `last.ckpt` in the background."""
        content = checkpoint_content(trainer, self.save_weights_only)
        part, begun = part_of(self._folder / LAST), list[Background]()
        write = lambda: begun.append(strategy.begin_checkpoint(content, part))  # noqa: E731
        if _on_all_ranks(self._outage, write, part=True):
            self._under_way = begun[0], place
        elif trainer.is_global_zero:
            with suppress(OSError):
                discard(part)

    def _finish(self, trainer: L.Trainer, *, wait: bool = True) -> None:
        """Give a finished background write its name; with `wait`, or once all ranks are done."""
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
        """Write `last.ckpt` by rank 0 alone: other ranks may wait elsewhere, or be gone."""
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
        except (OSError, RuntimeError, ConfigurationError) as error:  # the first failure is raised
            say(f"the state after batch {place[0]} could not be saved: {error}")
            return
        self.last_model_path = f"{self.dirpath}/{LAST}"
        self._place = place

    def _is_another_runs(self, trainer: L.Trainer) -> bool:
        """True if the folder's states belong to another run than the one that is resumed."""
        if is_remote(self.dirpath or ""):
            return False
        source = Path(trainer.ckpt_path or "/").resolve()
        return source.parent != self._folder.resolve()

    def write_best(self, trainer: L.Trainer, filepath: str) -> None:
        """Write one of the best states."""
        self._written = self._write(trainer, filepath)
        if not self._written:
            self._refused = filepath
            return
        self.note_saved(trainer, filepath)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _write(self, trainer: L.Trainer, filepath: str, aside: Path | None = None) -> bool:
        """Write a checkpoint; False if the disk refused it, which does not end the run."""
        content = checkpoint_content(trainer, self.save_weights_only)
        if is_remote(filepath):
            return _on_all_ranks(
                self._outage, partial(trainer.strategy.save_checkpoint, content, filepath)
            )
        part = part_of(filepath)
        write = partial(trainer.strategy.save_checkpoint, content, part)
        return self._named(trainer, write, Path(filepath), aside)

    def _named(
        self, trainer: L.Trainer, write: Callable[[], None], path: Path, aside: Path | None
    ) -> bool:
        """Let all ranks `write` their part, then give it its name; True if both worked."""
        part, first = part_of(path), trainer.is_global_zero
        name = partial(install, part, path, aside) if first else lambda: None
        written = _on_all_ranks(self._outage, write, part=True) and _on_all_ranks(
            self._outage, name
        )
        if not written and first:
            with suppress(OSError):  # the disk may be read-only now
                discard(part)
        return written

    def remove_worse(self, trainer: L.Trainer, filepath: str) -> None:
        """Remove a worse state, unless the better one could not be written."""
        if self._written:
            with suppress(OSError):  # a leftover does no harm
                super().remove_worse(trainer, filepath)


def _refuse_other_shards(trainer: L.Trainer) -> None:
    """Refuse Lightning's sharded strategies, which lose our strategies' state when they load."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullySharded):
        raise ConfigurationError(
            f"trainer.strategy: {type(strategy).__name__} has another checkpoint format; use "
            "scsdpo.checkpoints.FullySharded, which takes no mesh sizes"
        )


def _on_all_ranks(outage: Outage, write: Callable[[], Any], *, part: bool = False) -> bool:
    """Try `write` on every rank; True if it worked on all.

    All ranks must call it, and none waits for one that failed. A full disk or a missing folder is
    reported once and tried again with the next checkpoint. `part`: more work must follow before the
    checkpoint is complete.
    """
    return not bool(all_max(torch.tensor(float(not outage.attempt(write, part=part)))))


def _hand_over(trainer: L.Trainer, path: Path, signum: int) -> None:
    """Link a checkpoint under the name that a requeued SLURM job reads, and requeue the job.

    Lightning resumes from `hpc_ckpt_N.ckpt` in `trainer.default_root_dir`, unless `ckpt_path` names
    another. SLURM itself requeues a preempted job (SIGTERM), but not one whose time is over.
    """
    environment = cluster_environment(trainer)
    if not isinstance(environment, SLURMEnvironment) or not trainer.is_global_zero:
        return
    name = Path(requeue_path(trainer, trainer.default_root_dir))
    try:
        name.symlink_to(os.path.relpath(path, name.parent))
    except OSError as error:
        say(f"{name} could not be linked: {error.strerror}; resume with --ckpt_path {path}")
    requeue = environment.requeue_signal or signal.SIGUSR1
    if environment.auto_requeue and signum == requeue:
        subprocess.run(["scontrol", "requeue", _job_id()], check=False)


def _job_id() -> str:
    """Id of this job, or of this task of a job array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]
