"""Every figure of a run in one file, whatever the logger."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L

from scsdpo.records.folder import run_folder
from scsdpo.records.jsonl import JsonLines
from scsdpo.records.recorded import Recorded

NAME = "metrics.jsonl"


class MetricsFile(L.Callback):
    """`metrics.jsonl` in the run's folder: one line for each batch of training questions.

    A line holds `batch` (batches asked so far), `step` (optimizer steps taken), `time` (Unix time,
    seconds), every `train/*` figure that was logged for the batch and, where a validation
    followed, its `val/*` figures. A validation of the whole set before training is line 0.

    A checkpoint knows how many lines there were: a run that goes on from it cuts what came after,
    so that no batch is there twice. In another folder than the checkpoint's, it begins with a copy
    of the lines up to there. A run that starts anew in an old folder sets the old file aside.
    """

    def __init__(self) -> None:
        self.lines = 0
        self._resumed = False
        self._file: JsonLines | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines, self._resumed = state_dict["lines"], True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # a logger's version may ask rank 0: everyone must ask
        if not trainer.is_global_zero:
            return
        self._file = JsonLines(folder / NAME)
        if self._resumed:
            before = Path(trainer.ckpt_path or "").parent.parent / NAME
            if before.exists() and not self._file.path.exists():
                shutil.copyfile(before, self._file.path)
            self._file.cut(self.lines)
        else:
            self._file.set_aside()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, Recorded)
        self._append(trainer, int(pl_module.batches), pl_module.take_logged())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("val/")]
        whole = trainer.num_sanity_val_steps == float("inf")
        if trainer.state.fn != "fit" or (trainer.sanity_checking and not whole):
            return
        if self.lines == 0:
            self._append(trainer, 0, names)
        elif self._file is not None:
            self._file.extend(_values(trainer, names))

    def _append(self, trainer: L.Trainer, batch: int, names: Iterable[str]) -> None:
        self.lines += 1
        if self._file is not None:
            place = {"batch": batch, "step": trainer.global_step, "time": time.time()}
            self._file.append(place | _values(trainer, names))


def _values(trainer: L.Trainer, names: Iterable[str]) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {name: float(metrics[name]) for name in sorted(names) if name in metrics}
