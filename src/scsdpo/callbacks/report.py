"""The report of a run at its end."""

from pathlib import Path

import lightning as L
from rich.console import Console

from scsdpo.records import Outage, run_folder
from scsdpo.report import read_runs, write


class Report(L.Callback):
    """Write `report.html` among the run's files when `fit` ends, and print where it is.

    It is the page of `scsdpo report RUN`. One that cannot be written costs a warning.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # a logger's version may ask rank 0: everyone must ask
        if trainer.is_global_zero and Outage("the report", Exception).attempt(
            lambda: _write(folder)
        ):
            Console().print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _write(folder: Path) -> None:
    write(read_runs([str(folder)]), folder / "report.html")
