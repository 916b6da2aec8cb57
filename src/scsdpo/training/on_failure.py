"""What happens when a run fails: the state is saved, other ranks are told, a lost one is named."""

from typing import Protocol

import lightning as L

from scsdpo.errors import ConfigurationError, explain, first_line
from scsdpo.training.finite import spoiled
from scsdpo.training.last_good import save_last_good, told
from scsdpo.training.rank_watch import RankWatch, broke_off

_NEWS = 10.0
"""Seconds in which a failed collective is explained by the news that a rank is gone."""


class _Stepping(Protocol):
    """What takes the optimizer steps."""

    under_way: bool


class OnFailure(L.Callback):
    """Save what is good, tell the other ranks, name a rank that was lost; check weights at start.

    Args:
        steps: knows whether the weights are in the middle of a step.
    """

    def __init__(self, steps: _Stepping) -> None:
        self._steps = steps
        self._watch: RankWatch | None = None
        self._trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self._watch = RankWatch(trainer, lambda rank, said: _named(trainer, rank, said))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if fault := spoiled(pl_module.named_parameters()):
            came = trainer.ckpt_path or "model.policy"
            raise ConfigurationError(f"{came}: {fault}; start from other weights")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._trained = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        lost = None
        if self._watch is not None:
            if broke_off(exception):
                lost = self._watch.lost(_NEWS)
            self._watch.end(f"failed: {first_line(exception)}")
        if self._trained and isinstance(exception, Exception):
            save_last_good(trainer, whole=not self._steps.under_way)
        if lost is not None:
            explain(exception, _named(trainer, *lost))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.end("bye")


def _named(trainer: L.Trainer, rank: int, said: str) -> str:
    return f"rank {rank} {said}; {told(trainer)}"
