"""The parser of `scsdpo fit | validate | test | predict`."""

import inspect
from argparse import HelpFormatter
from typing import Any, NoReturn

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

import scsdpo.lab
from scsdpo.callbacks import Progress, RunRecords
from scsdpo.checkpoints import Checkpoint
from scsdpo.cli.config_errors import in_one_sentence
from scsdpo.cli.config_types import find
from scsdpo.data import TaskDataModule
from scsdpo.health import Health
from scsdpo.private.jsonargparse import spell_as, yields_names
from scsdpo.training import PolicyOptimizer

SECTIONS: dict[str, type] = {
    "model": PolicyOptimizer,
    "data": TaskDataModule,
    "trainer": Trainer,
    "checkpoint": Checkpoint,
    "records": RunRecords,
    "health": Health,
    "progress": Progress,
}
"""Class of each section of a configuration."""

# The names at the top level are for scripts. jsonargparse would write them, a class's shortest
# path, into configurations and checkpoints, which hold those of the packages.
for _home, _names in scsdpo.HOMES.items():
    for _name in _names if not _home.startswith("cli.") else ():
        spell_as(getattr(scsdpo, _name), f"scsdpo.{_home}.{_name}")

# Where bitsandbytes is installed peft imports it, and its AdamW and SGD are optimizers too.
yields_names("bitsandbytes")


class Parser(LightningArgumentParser):
    """Reports a mistake in one line that begins with the key; shows whole docstrings as help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, prog="scsdpo", **kwargs)
        self.allow_abbrev = False  # or `--trainer.max_step` would pass for `max_steps`

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        usage = super().format_help(formatter)
        # For `--KEY.help=NAME` jsonargparse makes a new parser whose description names the class.
        _, of_class, path = (self.description or "").partition(".help=")
        return f"{inspect.getdoc(find(path))}\n\n{usage}" if of_class else usage

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries one of several types
            super().error(message, ex)
        self.exit(2, f"scsdpo: error: {in_one_sentence(message, SECTIONS)}\n")
