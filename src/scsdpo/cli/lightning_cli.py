"""`scsdpo fit | validate | test | predict`: LightningCLI, with one-line errors."""

import json
import sys
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from scsdpo.checkpoints import Checkpoint
from scsdpo.cli.config_types import Builder
from scsdpo.cli.parser import SECTIONS, Parser
from scsdpo.cli.signals import Handlers
from scsdpo.data import TaskDataModule
from scsdpo.errors import MISTAKES, ConfigurationError
from scsdpo.training import PolicyOptimizer


class CLI(LightningCLI):
    """With a section `checkpoint`, and the model's configuration in every checkpoint."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the one that is asked for: building their parsers takes most of the start-up."""
        known = LightningCLI.subcommands()
        return {name: skip for name, skip in known.items() if [name] == sys.argv[1:2]} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 0})

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's configuration win over the command line."""

    def before_instantiate_classes(self) -> None:
        path = str(self.config[self.subcommand].ckpt_path or "last")
        named = path in ("best", "last", "hpc", "registry") or ":" in path  # by Lightning, or a URL
        if not named and not Path(path).exists():
            raise ConfigurationError(f"ckpt_path: {path} does not exist")

    def instantiate_classes(self) -> None:
        builder = Builder(self.config[self.subcommand].as_dict(), SECTIONS)
        self.parser.add_instantiator(builder, object)
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise builder.mistake or error from error.__cause__

    def after_instantiate_classes(self) -> None:
        config = self._parser(self.subcommand).dump(self.config[self.subcommand], format="json")
        # With this, `PolicyOptimizer.load_from_checkpoint` makes objects of what is described.
        maker = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        self.model.save_hyperparameters(json.loads(config)["model"] | maker, logger=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config[self.subcommand].trainer.enable_checkpointing is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (*MISTAKES, TypeError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {error}") from error
        trainer._signal_connector = _NoHandlers(trainer)
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            launcher = trainer.strategy.launcher
            Handlers.launched = staticmethod(lambda: launcher.procs)
        return trainer


class _NoHandlers(_SignalConnector):
    """Leaves signals to `scsdpo.cli.signals`."""

    def register_signal_handlers(self) -> None:
        """None."""


def main() -> None:
    """Run the command that `sys.argv` holds."""
    run_cli(CLI)


def run_cli(kind: type[CLI]) -> None:
    """Build what `sys.argv` configures and run it."""
    try:
        kind(
            PolicyOptimizer,
            TaskDataModule,
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs", "log_every_n_steps": 1},
        )
    except MisconfigurationException as error:
        raise ConfigurationError(str(error)) from error
