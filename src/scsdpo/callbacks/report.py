"""The report of a run at its end."""

import json
from functools import partial
from pathlib import Path

import lightning as L

from scsdpo.io.console import Terminal
from scsdpo.io.files import write_whole
from scsdpo.records import Outage, environment, run_folder
from scsdpo.report import read_runs, write


class Report(L.Callback):
    """Write `report.html` among the run's files when `fit` ends, and print where it is.

    It is the page of `scsdpo report RUN`. What it says of versions and machine is written into
    `environment.json` when `fit` begins. What cannot be written costs a warning.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # a logger's version may ask rank 0: everyone must ask
        if trainer.is_global_zero:
            found = environment(trainer)
            Outage("environment.json", OSError).attempt(partial(_note, folder, found))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and Outage("the report", Exception).attempt(
            partial(_report, folder)
        ):
            Terminal().print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _note(folder: Path, found: dict[str, str]) -> None:
    write_whole(folder / "environment.json", json.dumps(found, indent=1) + "\n")


def _report(folder: Path) -> None:
    write(read_runs([str(folder)]), folder / "report.html")
