"""The parser of `scsdpo fit | validate | test | predict`."""

import sys
from typing import Any, NoReturn

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

import scsdpo.callbacks
import scsdpo.lab  # noqa: F401 - so that their classes go by short names
from scsdpo.checkpoint import Checkpoint
from scsdpo.config_errors import explain
from scsdpo.data import TaskDataModule
from scsdpo.module import PolicyOptimizer

SECTIONS: dict[str, type] = {
    "model": PolicyOptimizer,
    "data": TaskDataModule,
    "trainer": Trainer,
    "checkpoint": Checkpoint,
}
"""Class of each section of a configuration."""


class Parser(LightningArgumentParser):
    """Says what is wrong in one line that begins with the key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # or `--trainer.max_step` would pass for `max_steps`

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries one of several types
            super().error(message, ex)
        self.exit(2, f"scsdpo: error: {explain(message, SECTIONS, sys.argv[1:])}\n")
