"""What happens when a run fails: other ranks are told, and one that was lost is named."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from scsdpo.checkpoints import newest_whole
from scsdpo.errors import ConfigurationError, explain, first_line
from scsdpo.training.finite import spoiled
from scsdpo.training.rank_watch import RankWatch, broke_off

_NEWS = 10.0
"""Seconds in which a failed collective is explained by the news that a rank is gone."""


class OnFailure(L.Callback):
    """Tell the other ranks, and name one that was lost; check weights at start.

    The last good state is saved by `Checkpoint`.
    """

    def __init__(self) -> None:
        self._watch: RankWatch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self._watch = RankWatch(trainer, lambda rank, said: _named(trainer, rank, said))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if fault := spoiled(pl_module.named_parameters()):
            came = trainer.ckpt_path or "model.policy"
            raise ConfigurationError(f"{came}: {fault}; start from other weights")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        lost = None
        if self._watch is not None:
            if broke_off(exception):
                lost = self._watch.lost(_NEWS)
            self._watch.end(f"failed: {first_line(exception)}")
        if lost is not None:
            explain(exception, _named(trainer, *lost))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.end("bye")


def _named(trainer: L.Trainer, rank: int, said: str) -> str:
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    newest = next(filter(None, (newest_whole(Path(folder)) for folder in folders if folder)), None)
    place = f"the newest whole checkpoint is {newest}" if newest else "there is no checkpoint yet"
    return f"rank {rank} {said}; {place}"
