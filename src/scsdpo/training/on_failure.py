"""Tells the other ranks when a run fails, and names a rank that was lost."""

from pathlib import Path

import lightning as L

from scsdpo.checkpoints import Checkpoint, newest_whole
from scsdpo.errors import ConfigurationError, explain, first_line
from scsdpo.interrupt import Interrupted
from scsdpo.training.finite import non_finite
from scsdpo.training.rank_watch import RankWatch, broke_off

_NEWS = 10.0
"""Seconds to wait, after a collective has failed, for the news that a rank is gone."""


class OnFailure(L.Callback):
    """Tells the other ranks of a failure, and learns which rank was lost.

    It refuses non-finite weights at the start, too. `Checkpoint` saves the state.
    """

    def __init__(self) -> None:
        self._watch: RankWatch | None = None
        self.lost: tuple[int, str] | None = None
        """Number of a lost rank, and what became of it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self._watch = RankWatch(trainer, lambda rank, said: _named(trainer, rank, said))
            # Last of all, behind the callbacks that save, which Lightning puts at the end.
            trainer.callbacks = [*trainer.callbacks, _LastWords(self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if fault := non_finite(pl_module.named_parameters()):
            came = trainer.ckpt_path or "model.policy"
            raise ConfigurationError(f"{came}: {fault}; start from other weights")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._watch is None:
            return
        if broke_off(exception):
            self.lost = self._watch.lost(_NEWS)
        stopped = isinstance(exception, Interrupted)  # and so have all
        self._watch.end("bye" if stopped else f"failed: {first_line(exception)}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.end("bye")


class _LastWords(L.Callback):
    """Adds a lost rank's name and the newest checkpoint to the exception."""

    def __init__(self, failure: OnFailure) -> None:
        self._failure = failure

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._failure.lost is not None:
            explain(exception, _named(trainer, *self._failure.lost))


def _named(trainer: L.Trainer, rank: int, said: str) -> str:
    return f"rank {rank} {said}; {where_to_resume(trainer)}"


def newest_checkpoint(trainer: L.Trainer) -> Path | None:
    """The newest whole checkpoint in the run's folders, found without a collective or a load."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]
    return newest_whole(*(Path(folder) for folder in folders if folder is not None))


def where_to_resume(trainer: L.Trainer) -> str:
    """The newest complete checkpoint, in words."""
    newest = newest_checkpoint(trainer)
    return f"the newest complete checkpoint is {newest}" if newest else "there is no checkpoint yet"
