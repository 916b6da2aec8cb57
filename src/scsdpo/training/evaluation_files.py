"""Each validation of a run as a file, to be compared question by question."""

import re
from functools import partial
from pathlib import Path

import lightning as L

from scsdpo.records import Outage, begin_path, recorded, run_folder
from scsdpo.training.evaluation import Evaluation

FOLDER = "evaluations"
_NAME = re.compile(r"val-(\d+)\.json")


class EvaluationFiles(L.Callback):
    """`evaluations/val-BATCH.json` in the run's folder, after each whole validation of a fit.

    A run that goes on from a checkpoint deletes those of later batches, and in another folder than
    the checkpoint's it begins with copies of those before; one that starts anew in an old folder
    sets the old ones aside. What cannot be written (a full disk) is said once.

    Args:
        evaluation: of the module.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._outage = Outage(FOLDER, OSError)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer) / FOLDER  # may ask rank 0: everyone must ask
        if trainer.is_global_zero:
            batches = int(recorded(pl_module).batches)
            self._outage.attempt(partial(_begin, folder, batches, trainer.ckpt_path))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if trainer.state.fn != "fit" or not whole:
            return
        folder = run_folder(trainer) / FOLDER
        if trainer.is_global_zero:
            result = self._evaluation.result
            path = folder / f"val-{result.about['batch']}.json"
            self._outage.attempt(partial(result.write, path))


def _begin(folder: Path, batch: int, checkpoint: str | Path | None) -> None:
    begin_path(folder, batch, checkpoint)
    for path in folder.glob("val-*.json"):
        found = _NAME.fullmatch(path.name)
        if found and int(found[1]) > batch:
            path.unlink()
