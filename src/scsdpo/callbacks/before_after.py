"""A table at a run's end: validation accuracy before and after."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from rich.table import Table

from scsdpo.data import TaskDataModule
from scsdpo.io.console import Terminal
from scsdpo.io.files import write_whole
from scsdpo.records import Outage


class BeforeAfter(L.Callback):
    """Print validation accuracy before and after `fit`, by category, and where the files are.

    "Before" is Lightning's sanity check over the whole validation set
    (`trainer.num_sanity_val_steps: -1`), or the first validation of a run without one. "After" is
    the last validation. A run that goes on from a checkpoint keeps the "before" of its start. The
    numbers are written to `before_after.json` in the run's folder before the table is printed.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Accuracies for the checkpoint."""
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take "before" from the run's first part."""
        self.before, self.after = state_dict["before"], state_dict["after"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        self.before = self.before or values
        self.after = values

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # a collective: all ranks must call it
        if not (trainer.is_global_zero and self.after):
            return
        folder = Path(log_dir) if log_dir is not None else None
        result = {"before": self.before, "after": self.after, "steps": trainer.global_step}
        text = json.dumps(result, indent=2) + "\n"
        if folder is not None and not Outage("before_after.json", OSError).attempt(
            partial(write_whole, folder / "before_after.json", text)
        ):
            folder = None
        Outage("printing the table at the end", Exception).attempt(
            partial(self._show, trainer, pl_module, folder)
        )

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path | None) -> None:
        """Print the table, and where the files are."""
        console = Terminal()
        data = vars(trainer).get("datamodule")  # Lightning sets it where there is one
        trained_on = data.trained_on if isinstance(data, TaskDataModule) else 0
        console.print(before_after_table(self.before, self.after, trained_on=trained_on))
        why = f": {why_no_steps(trainer, pl_module)}" if trainer.global_step == 0 else ""
        plural = "" if trainer.global_step == 1 else "s"
        console.print(f"{trainer.global_step} optimizer step{plural} taken{why}", soft_wrap=True)
        if folder is not None:
            console.print(f"files of this run: {folder}", soft_wrap=True)


def before_after_table(
    before: Mapping[str, float], after: Mapping[str, float], *, trained_on: int = 0
) -> Table:
    """One row per category, the overall one last; accuracies in percent, differences in points.

    Args:
        before: name of a figure -> its value before.
        after: name of a figure -> its value after.
        trained_on: number of these questions that were trained on, too.
    """
    metrics = sorted({name.rpartition("/")[2] for name in after}, reverse=True)
    held_out = "" if trained_on else "held-out "
    said = f"not held out: {trained_on} are trained on" if trained_on else None
    table = Table(title=f"{held_out}questions, %, before -> after", caption=said)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    categories = sorted({name.rpartition("/")[0] for name in after} - {""})
    for category in categories:
        table.add_row(category, *(_cell(before, after, f"{category}/{m}") for m in metrics))
    if categories:
        table.add_section()
    table.add_row("all", *(_cell(before, after, metric) for metric in metrics))
    return table


def _cell(before: Mapping[str, float], after: Mapping[str, float], name: str) -> str:
    if name not in before:  # no question of this category was asked before
        return f"{100 * after[name]:.1f}"
    change = 100 * (after[name] - before[name])
    return f"{100 * before[name]:.1f} -> {100 * after[name]:.1f} ({change:+.1f})"


def why_no_steps(trainer: L.Trainer, module: Any) -> str:
    """Say in words why a run took no optimizer step, from its counts and its last batch.

    Args:
        trainer: the run's Trainer, with the last batch's figures.
        module: the `PolicyOptimizer`.
    """
    sampled, steps = int(module.batches), module.steps
    if sampled == 0:
        return "no batch was sampled; look at trainer.max_steps, max_epochs and limit_train_batches"
    if int(steps.bad):
        return f"none of {sampled} batches had a finite loss and gradient; look at the warnings"
    if not int(steps.skipped):
        return f"model.selection had not collected a batch after {sampled} batches were sampled"
    why = _why_nothing(trainer.callback_metrics)
    return f"{sampled} batches, with nothing to learn from in them; {why}"


def _why_nothing(figures: Mapping[str, Any]) -> str:
    none, every = (float(figures[f"train/solve_{what}"]) for what in ("none", "all"))
    if none == 1:
        return (
            "no response of the last one was right: the questions are too hard, or the verifier "
            "does not accept the policy's format (`scsdpo predict` shows its responses)"
        )
    if every == 1:
        return "every response of the last one was right: these questions are mastered"
    if none + every == 1:
        return (
            "in the last one each question's responses were all right or all wrong, so that "
            "none had a sibling to learn from"
        )
    return (
        "model.weighting gives all questions of the last one weight 0, or its responses have no "
        "teacher, route or difference in reward, or model.token_weighting gives all their tokens "
        "weight 0"
    )
