"""Writes predictions to a file."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from scsdpo.errors import ConfigurationError
from scsdpo.io.files import parsed, whole_lines, write_object
from scsdpo.records import JsonLines, recorded

SCHEMA_VERSION = 1
FORMATS = (".jsonl", ".parquet")
"""Suffixes of the formats."""
_ABOUT = ".about.json"
_PART = ".part-"


class PredictionWriter(BasePredictionWriter):
    """Write each response of `scsdpo predict` with its question and verdict, and say where.

    While it runs, each rank appends each batch to `PATH.part-RANK`, durably. At the end these parts
    become PATH, in the order of the questions. A prediction that was stopped goes on with the
    missing questions when it is run again for the same PATH, on any number of ranks. Policy,
    checkpoint and sampling are written to `PATH.about.json`.

    Args:
        path: file to write; `.jsonl`: one JSON object per line; `.parquet`: a table of these rows.

    Raises:
        ValueError: if the path has another suffix, or pyarrow is missing for a table.
        ConfigurationError: from `setup`, if the file is complete, or was begun with another policy
            or another sampling.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        if self.path.suffix not in ("", *FORMATS):
            raise ValueError(
                f"`PredictionWriter(path={path!r})` must end in {' or '.join(FORMATS)}"
            )
        if self.path.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise ValueError(
                f"`PredictionWriter(path={path!r})` needs pyarrow: install it, or write .jsonl"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        if self.path.exists():
            raise ConfigurationError(
                f"predictions: {self.path} exists and is complete; move it or choose another path"
            )
        about = self._about(trainer, pl_module)
        self._check(about)
        kept = _complete(self._rows(), about["sampling"]["n"])
        trainer.strategy.barrier("predictions were read")
        if trainer.is_global_zero:
            self._begin(about, kept)
        trainer.strategy.barrier("predictions were cut")
        k = about["sampling"]["n"]
        done = {(row["key"], row["sample"] // k) for row in kept}
        trainer.datamodule.answered = done  # type: ignore[attr-defined]

    def _about(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        changed = checkpoint.stat().st_mtime_ns if checkpoint and checkpoint.exists() else None
        about = {
            "schema_version": SCHEMA_VERSION,
            "kind": "predictions",
            **recorded(pl_module).described(),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "checkpoint_changed_ns": changed,
        }
        return json.loads(json.dumps(about))  # as it is read back

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _check(self, about: Mapping[str, Any]) -> None:
        file = self._beside(_ABOUT)
        if not file.exists():
            return
        before = parsed(file.read_bytes())
        if before is None:
            raise ConfigurationError(
                f"predictions: {file} is damaged; delete {self.path.name}* or choose another path"
            )
        odd = [name for name in about if before.get(name) != about[name]]
        if odd:
            raise ConfigurationError(
                f"predictions: {self.path} was begun with {odd[0]} = {before.get(odd[0])}, now "
                f"{about[odd[0]]}; delete {self.path.name}* or choose another path"
            )

    def _begin(self, about: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> None:
        """Make one part of the complete rows, and write the `about` file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_object(self._beside(_ABOUT), about)
        whole = self._beside(f"{_PART}done")
        partial = JsonLines(self._beside(".new"))
        partial.path.unlink(missing_ok=True)
        partial.append(*kept)
        partial.path.replace(whole)
        for part in self._parts():
            if part != whole:
                part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}{_PART}*"))

    def _rows(self) -> Iterator[dict[str, Any]]:
        for part in self._parts():
            yield from whole_lines(part, "key", "sample")

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
        JsonLines(self._beside(f"{_PART}{trainer.global_rank}")).append(*prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("predictions are written")
        if not trainer.is_global_zero:
            return
        prompts = trainer.datamodule.val_prompts()  # type: ignore[attr-defined]
        order = {(prompt.key, prompt.copy): place for place, prompt in enumerate(prompts)}
        k = recorded(pl_module).described()["sampling"]["n"]
        rows = sorted(
            self._rows(),
            key=lambda row: (order.get((row["key"], row["sample"] // k), -1), row["sample"]),
        )
        partial = self._beside(".new")
        partial.unlink(missing_ok=True)
        if self.path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        else:
            JsonLines(partial).append(*rows)
        partial.replace(self.path)
        for part in self._parts():
            part.unlink()
        print(f"{len(rows)} responses: {self.path}")


def _complete(rows: Iterable[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """The rows of questions that have all k responses; each copy of a question counts by itself."""
    found = list(rows)
    counts = Counter((row["key"], row["sample"] // k) for row in found)
    return [row for row in found if counts[row["key"], row["sample"] // k] == k]
