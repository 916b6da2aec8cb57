"""Write every logged figure of a run to one file, whatever the logger."""

import time
from pathlib import Path
from typing import Any

import lightning as L

from scsdpo.io.files import tell
from scsdpo.records.folder import run_folder
from scsdpo.records.jsonl import JsonLines
from scsdpo.records.lock import hold, release
from scsdpo.records.outage import Outage
from scsdpo.records.recorder import recorded

NAME = "metrics.jsonl"


class MetricsFile(L.Callback):
    """`metrics.jsonl` in the run's folder: one line for each batch of training questions.

    A line holds `batch` (batches asked so far), `step` (optimizer steps taken), `time` (Unix time,
    seconds), every `train/*` figure that was logged for the batch and, where a validation
    followed, its `val/*` figures. A validation of the whole set before training is line 0.

    A run that is resumed from a checkpoint removes later lines, so that no batch appears twice; in
    another folder than the checkpoint's it begins with a copy of the earlier lines. A new run in an
    old folder renames the old file. Lines that cannot be written (a full disk, a missing folder)
    are kept and written with a later one; those that never could be are counted at the end. The
    folder is locked until the run ends.
    """

    def __init__(self) -> None:
        self._file: JsonLines | None = None
        self._begin: tuple[int, str | Path | None] | None = None
        """Arguments of `JsonLines.begin`, until it was called."""
        self._waiting: list[dict[str, Any]] = []
        self._outage = Outage(NAME, OSError)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            hold(trainer, run_folder(trainer), needed=False)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # a logger's version may be a broadcast: all ranks must call
        if not trainer.is_global_zero:
            return
        self._file = JsonLines(folder / NAME)
        self._begin = int(recorded(pl_module).batches), trainer.ckpt_path
        self._outage.attempt(self._begin_file)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if trainer.state.fn == "fit" and whole:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._waiting and not self._write_waiting():
            tell(f"{len(self._waiting)} lines of {NAME} could not be written and are lost")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self._file is not None:
            release(self._file.path.parent)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the figures that were logged since the last call into the batch's line."""
        module, metrics = recorded(pl_module), trainer.callback_metrics
        logged = module.recorder.take_logged()
        if self._file is None:
            return
        figures = {name: float(metrics[name]) for name in sorted(logged) if name in metrics}
        place = {"batch": int(module.batches), "step": trainer.global_step, "time": time.time()}
        self._waiting.append(place | figures)
        self._write_waiting()

    def _write_waiting(self) -> bool:
        """Write waiting lines; True if none is left."""
        while self._waiting and self._outage.attempt(self._write_one):
            self._waiting.pop(0)
        return not self._waiting

    def _begin_file(self) -> None:
        assert self._file is not None
        if self._begin is not None:
            self._file.begin(*self._begin)
            self._begin = None

    def _write_one(self) -> None:
        assert self._file is not None
        self._begin_file()
        record = self._waiting[0]
        if self._file.last.get("batch") != record["batch"]:
            self._file.append(record)
            return
        of_batch = ("batch", "step", "time")
        self._file.extend({name: value for name, value in record.items() if name not in of_batch})
