"""Predictions as a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from scsdpo.errors import ConfigurationError


class PredictionWriter(BasePredictionWriter):
    """Append each response of `scsdpo predict` with its verdict to a JSON-lines file, per batch.

    Nothing is kept in memory, and nothing is lost if the run is stopped.

    Args:
        path: file to write; with several ranks, each appends `.<rank>`. It must not exist.

    Raises:
        ValueError: from `setup`, if the file exists.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict" and self._file(trainer).exists():
            raise ConfigurationError(
                f"`PredictionWriter(path=...)`: {self._file(trainer)} exists; move it or choose "
                "another path"
            )

    def _file(self, trainer: L.Trainer) -> Path:
        one = trainer.world_size == 1
        return Path(self.path if one else f"{self.path}.{trainer.global_rank}")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self._file(trainer).open("a") as file:
            for record in prediction:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
