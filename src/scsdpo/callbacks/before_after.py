"""What a run achieved, as a table at its end."""

from collections.abc import Mapping

import lightning as L
from rich.console import Console
from rich.table import Table


class BeforeAfter(L.Callback):
    """Print validation accuracy before and after `fit`, by category, and where the files are.

    "Before" is Lightning's sanity check run over the whole validation set
    (`trainer.num_sanity_val_steps: -1`); "after" is the last validation of the run. A resumed run
    has no sanity check, and then the table has no first column.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if trainer.sanity_checking:
            self.before = values
        else:
            self.after = values

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.after:
            console = Console()
            console.print(before_after_table(self.before, self.after))
            console.print(f"{trainer.global_step} optimizer steps; files in {trainer.log_dir}")


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """One row per category, the overall one last; accuracies in percent, differences in points."""
    metrics = sorted({name.rpartition("/")[2] for name in after}, reverse=True)
    table = Table(title="held-out questions, %")
    table.add_column("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    categories = sorted({name.rpartition("/")[0] for name in after} - {""})
    for category in [*categories, ""]:
        names = [f"{category}/{metric}" if category else metric for metric in metrics]
        cells = [_cell(before.get(name), after[name]) for name in names]
        table.add_row(category or "all", *cells, end_section=category == (categories or [""])[-1])
    return table


def _cell(before: float | None, after: float) -> str:
    if before is None:
        return f"{100 * after:.1f}"
    return f"{100 * before:.1f} -> {100 * after:.1f} ({100 * (after - before):+.1f})"
