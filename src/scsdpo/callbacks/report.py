"""Writes the report of a run at its end."""

from functools import partial
from pathlib import Path

import lightning as L

from scsdpo.io.console import Terminal
from scsdpo.io.files import write_object
from scsdpo.records import Outage, environment, run_folder
from scsdpo.report import read_runs, write


class Report(L.Callback):
    """Write `report.html` in the run's folder when `fit` ends, and print where it is.

    It is the page of `scsdpo report RUN`. Versions and machine, which are on it, are written to
    `environment.json` when `fit` begins. A file that cannot be written gives a warning.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # may be a collective: all ranks must call it
        if trainer.is_global_zero:
            found = environment(trainer)
            Outage("environment.json", OSError).attempt(
                partial(write_object, folder / "environment.json", found)
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and Outage("the report", Exception).attempt(
            partial(_report, folder)
        ):
            Terminal().print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _report(folder: Path) -> None:
    write(read_runs([str(folder)]), folder / "report.html")
