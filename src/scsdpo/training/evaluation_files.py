"""Each validation of a run as a file, to be compared question by question."""

import re
import shutil
from functools import partial
from pathlib import Path

import lightning as L

from scsdpo.records import Outage, Recorded, run_folder
from scsdpo.training.evaluation import Evaluation

FOLDER = "evaluations"
_NAME = re.compile(r"val-(\d+)\.json")


class EvaluationFiles(L.Callback):
    """`evaluations/val-BATCH.json` in the run's folder, after each whole validation of a fit.

    A run that goes on from a checkpoint deletes those of later batches; one that starts anew in an
    old folder sets the old ones aside. What cannot be written (a full disk) is said once.

    Args:
        evaluation: of the module.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._outage = Outage(FOLDER, OSError)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer) / FOLDER  # may ask rank 0: everyone must ask
        if not trainer.is_global_zero or not folder.exists():
            return
        assert isinstance(pl_module, Recorded)
        batches = int(pl_module.batches)
        if batches == 0 and not trainer.ckpt_path:
            aside = next(p for n in range(1, 10**6) if not (p := Path(f"{folder}.{n}")).exists())
            shutil.move(folder, aside)
            return
        for path in folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and int(found[1]) > batches:
                path.unlink()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if trainer.state.fn != "fit" or not whole:
            return
        folder = run_folder(trainer) / FOLDER
        if trainer.is_global_zero:
            result = self._evaluation.result
            path = folder / f"val-{result.about['batch']}.json"
            self._outage.attempt(partial(result.write, path))
