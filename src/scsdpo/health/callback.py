"""The callback that checks the rules and warns."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from scsdpo.checkpoints import say
from scsdpo.health._base import Finding, Rule, Series
from scsdpo.health.rules import shipped_rules
from scsdpo.io.files import whole_lines
from scsdpo.records import (
    SCHEMA_VERSION,
    HealthRecord,
    JsonLines,
    Outage,
    TextLog,
    recorded,
    run_folder,
)

NAME = "health.jsonl"


class Health(L.Callback):
    """Checks a run's figures after each batch and validation, and warns: docs/health.md.

    Each rule warns once in a run, on standard error, in the logger and in `health.jsonl`. A run
    that goes on from a checkpoint keeps the figures of its earlier parts.

    Args:
        rules: the rules; null: all shipped ones, []: none.
    """

    def __init__(self, rules: tuple[Rule, ...] | None = None) -> None:
        self.rules = shipped_rules() if rules is None else rules
        self._past, self._said = Series(), set[str]()
        self._file: JsonLines | None = None
        self._outage, self._text = Outage(NAME, OSError), TextLog()
        self._folder = Path()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._folder, self._file = run_folder(trainer), None  # may be a collective
        self._past, self._said = Series(), set()
        if trainer.is_global_zero and self.rules:
            file = JsonLines(self._folder / NAME)
            batch, checkpoint = int(recorded(pl_module).batches), trainer.ckpt_path
            self._outage.attempt(partial(file.begin, batch, checkpoint))
            self._file = file

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the figures of earlier parts, now that `metrics.jsonl` is cut at the checkpoint."""
        if self._file is not None:
            for line in whole_lines(self._folder / "metrics.jsonl"):
                self._past.add(line)
            self._said = {line["rule"] for line in whole_lines(self._file.path, "rule")}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the figures that were logged since the last call."""
        if self._file is None:
            return
        module, metrics = recorded(pl_module), trainer.callback_metrics
        names = (name for name in module.recorder.logged if name in metrics)
        self._past.add({name: float(metrics[name]) for name in names})
        for rule in self.rules:
            name = type(rule).__name__
            if name not in self._said and (finding := rule.look(self._past)):
                self._said.add(name)
                place = {"batch": int(module.batches), "step": trainer.global_step}
                self._say(trainer, name, rule, finding, place)

    def _say(
        self,
        trainer: L.Trainer,
        name: str,
        rule: Rule,
        finding: Finding,
        place: Mapping[str, int],
    ) -> None:
        assert self._file is not None
        said = f"{finding.message}. {rule.remedy[0].upper()}{rule.remedy[1:]}"
        say(f"warning ({name}, batch {place['batch']}): {said}")
        self._text.write(trainer, "health", [("rule", name), ("warning", said)], place["batch"])
        record = HealthRecord(
            schema_version=SCHEMA_VERSION,
            batch=place["batch"],
            step=place["step"],
            time=time.time(),
            rule=name,
            message=finding.message,
            remedy=rule.remedy,
            values=dict(finding.values),
        )
        self._outage.attempt(partial(self._file.append, record))
