"""`scsdpo fit | validate | test | predict`: LightningCLI, with one-line errors."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from transformers.utils.logging import disable_progress_bar

from scsdpo.callbacks import Progress, RunRecords
from scsdpo.checkpoints import (
    Change,
    Checkpoint,
    Consequence,
    Saved,
    changes,
    newest,
    say,
    usable_neighbour,
)
from scsdpo.cli.config_types import Builder
from scsdpo.cli.overlays import kept, replaced_rate
from scsdpo.cli.parser import SECTIONS, Parser
from scsdpo.cli.signals import Handlers
from scsdpo.data import TaskDataModule
from scsdpo.errors import MISTAKES, ConfigurationError, TrainingStopped, blamed_on
from scsdpo.health import Health
from scsdpo.interrupt import Interrupted
from scsdpo.io.files import write_whole
from scsdpo.private.lightning import (
    INSTANTIATOR,
    ForkLauncher,
    ScriptLauncher,
    requeued_from,
    silence_signal_handlers,
)
from scsdpo.private.lightning_cli import OpenCLI
from scsdpo.records import Outage, hold, run_folder, runs_folder
from scsdpo.training import PolicyOptimizer
from scsdpo.training.on_failure import where_to_resume
from scsdpo.training.run_checks import check_strategy

_COMPARED = (*SECTIONS, "seed_everything")
"""Keys of the configuration that a checkpoint holds and a resumed run is compared with."""
_TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 1,
    "enable_model_summary": False,  # the line `plan:` says memory and time instead
}
_LIGHTNING = "lightning.pytorch.utilities.rank_zero"
"""The name under which Lightning logs."""
_SAYS_NOTHING = ("💡 Tip:", "TPU available:", "HPU available:", "GPU available: False")


class CLI(OpenCLI):
    """LightningCLI with our sections, and the model's configuration in every checkpoint."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The called command alone, because building a parser takes most of the start-up."""
        known = LightningCLI.subcommands()
        return {name: skip for name, skip in known.items() if [name] == sys.argv[1:2]} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(RunRecords, "records")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(Progress, "progress")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 0})

    def instantiate_classes(self) -> None:
        self._leftovers = kept(sys.argv[2:], self.config[self.subcommand].as_dict())
        for each in self._leftovers:
            say(str(each))
        builder = Builder(self.config[self.subcommand].as_dict(), SECTIONS)
        self.parser.add_instantiator(builder, object)
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise self._with_leftovers(builder.mistake or error) from error.__cause__

    def _with_leftovers(self, error: Exception) -> Exception:
        """A mistake at a class that has arguments left of another one says so."""
        said = [str(each) for each in self._leftovers if str(error).startswith(f"{each.owner}: ")]
        if not said or not isinstance(error, ConfigurationError):
            return error
        return ConfigurationError(f"{error} ({'; '.join(said)})")

    def after_instantiate_classes(self) -> None:
        self.datamodule.check_ranks(self.trainer.world_size)
        try:
            config = self.subcommand_parser().dump(self.config[self.subcommand], format="json")
        except (TypeError, ValueError) as error:  # a checkpoint holds the configuration
            raise ConfigurationError(
                "trainer: an argument of a callback, logger, profiler or plugin cannot be written "
                "as YAML (lightning's Timer has one: use trainer.max_time)"
            ) from error
        # With this, `PolicyOptimizer.load_from_checkpoint` makes objects of what is described.
        maker = {INSTANTIATOR: "lightning.pytorch.cli.instantiate_module"}
        described = json.loads(config)
        self.model.save_hyperparameters(described["model"] | maker, logger=False)
        for saver in self.trainer.checkpoint_callbacks:
            if isinstance(saver, Checkpoint):
                saver.config = {key: described[key] for key in described if key in _COMPARED}
        if self.subcommand == "fit":
            optimizer = described["model"]["optimizer"].get("init_args") or {}
            if said := replaced_rate(sys.argv[2:], optimizer.get("lr")):
                rank_zero_info(said)
        self._choose_checkpoint(described)

    def _choose_checkpoint(self, described: dict[str, Any]) -> None:
        """Find and compare the checkpoint before weights are loaded and config.yaml is written."""
        command = self.subcommand
        assert command is not None
        given = self.config[command].ckpt_path
        if given is not None and ":" in str(given):  # a URL, which Lightning reads
            return
        saved = _resolved(given, self.trainer, described, command)
        if saved is None:
            return
        self.model.changed = _compared(saved, described, command)
        self.model.policy_only = command != "fit"
        for config in (self.config, self.config_init):
            config[command].ckpt_path = str(saved.path)

    def run_subcommand(self, subcommand: str) -> None:
        try:
            super().run_subcommand(subcommand)
        except ConfigurationError as error:
            raise self._with_leftovers(error) from error.__cause__
        except Interrupted:  # Lightning then tears nothing down
            self.model.teardown(subcommand)
            self._check_saved()
            raise
        self._check_saved()

    def _check_saved(self) -> None:
        """Rank 0 reports a last state that the run cannot be resumed from.

        Raises:
            TrainingStopped: if its last state was not saved, or cannot be read back.
        """
        savers = (
            each for each in self.trainer.checkpoint_callbacks if isinstance(each, Checkpoint)
        )
        faults = [fault for saver in savers if (fault := saver.unsaved(self.trainer))]
        if faults and self.trainer.is_global_zero:
            raise TrainingStopped(f"{'; '.join(faults)}; {where_to_resume(self.trainer)}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config[self.subcommand].trainer.enable_checkpointing is False:
            self.subcommand_parser().callback_keys.remove("checkpoint")
        named: Any = self.config[self.subcommand].trainer.strategy
        if isinstance(named, str) and named in StrategyRegistry:
            # Before Lightning asks for the devices that it needs.
            check_strategy(StrategyRegistry[named]["strategy"])
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (*MISTAKES, TypeError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {error}") from error
        if isinstance(trainer.strategy.launcher, ForkLauncher):
            raise ConfigurationError(
                f"trainer.strategy: {self.config[self.subcommand].trainer.strategy} starts "
                "ranks by forking a process that already has threads, which can hang: set it to "
                "ddp, which starts each rank as a new process"
            )
        silence_signal_handlers(trainer)  # they are those of `scsdpo.cli.signals`
        if isinstance(trainer.strategy.launcher, ScriptLauncher):
            launcher = trainer.strategy.launcher
            Handlers.launched = staticmethod(lambda: launcher.procs)
        return trainer


def _resolved(
    given: str | None, trainer: Trainer, config: Mapping[str, Any], command: str
) -> Saved | None:
    """The checkpoint that a command loads; None: it loads none.

    Args:
        given: a path or `last`; None: a job that SLURM has requeued resumes, others start anew.
        trainer: gives the folder of runs.
        config: of the command, by section.
        command: `fit` resumes the whole state; others load the policy only.

    Raises:
        ConfigurationError: if the checkpoint does not exist or cannot be used.
    """
    fit = command == "fit"
    if given is None:
        requeued = requeued_from(trainer) if fit and SLURMEnvironment.detect() else None
        if requeued is None:
            return None
        given = str(Path(requeued).resolve())
    with blamed_on("ckpt_path"):
        if given == "last":
            return newest(runs_folder(trainer), config, whole_run=fit)
        if given in ("best", "hpc", "registry"):
            raise ValueError(f"must be `last` or a path, got {given}")
        return _whole(Path(given), resumable=fit)


def _compared(saved: Saved, config: Mapping[str, Any], command: str) -> Sequence[Change]:
    """Say in one line each what has changed since the checkpoint; returns the changes.

    Raises:
        ConfigurationError: if a change is not allowed.
    """
    found = changes(saved.config, config)
    if command != "fit":
        found = [change for change in found if change.key.startswith("model.policy")]
    refused = [change for change in found if change.consequence is Consequence.REFUSE]
    if refused:
        raise ConfigurationError(
            f"{'; '.join(map(str, refused))}: cannot change after {saved.path} was written; "
            "set it back, or begin a new run"
        )
    for change in found:
        assert change.consequence is not None
        warning = "warning: " if change.consequence is Consequence.WARN else ""
        say(f"{warning}{change}: {change.consequence.value}")
    return found


def _whole(path: Path, *, resumable: bool) -> Saved:
    try:
        saved = Saved.read(path)
    except ValueError as error:
        runs = path.is_dir() and path.suffix != ".ckpt"
        other = usable_neighbour(path) if path.parent.is_dir() and not runs else None
        hint = f"; {other} is complete" if other is not None else ""
        raise ValueError(f"{error}{hint}") from error
    if resumable and not saved.resumable:
        raise ValueError(
            f"{path} holds weights only, training cannot go on from it: `scsdpo export` it, and "
            "name the folder in model.policy.name_or_path"
        )
    return saved


class _SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder atomically; a full disk does not end the run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        hold(trainer, run_folder(trainer), needed=False)  # before another run's is written over
        folder = trainer.log_dir  # rank 0 tells the others
        if trainer.is_global_zero and folder is not None:
            text = self.parser.dump(self.config, skip_none=False)
            write = partial(write_whole, Path(folder) / self.config_filename, text)
            Outage(self.config_filename, OSError).attempt(write)


def _tells_of_the_run(record: logging.LogRecord) -> bool:
    """False for Lightning's tips and for its lines on absent devices."""
    return not record.getMessage().startswith(_SAYS_NOTHING)


def main(args: Sequence[str]) -> None:
    """Run the command that `sys.argv` holds; `args` follow it there."""
    run_cli(CLI)


def run_cli(kind: type[CLI]) -> None:
    """Build what `sys.argv` configures and run it."""
    logging.getLogger(_LIGHTNING).addFilter(_tells_of_the_run)
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers', of weights that load
    try:
        kind(
            PolicyOptimizer,
            TaskDataModule,
            parser_class=Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            # Another command must not write over the configuration of a run.
            save_config_callback=_SaveConfig if sys.argv[1:2] == ["fit"] else None,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults=_TRAINER_DEFAULTS,
        )
    except MisconfigurationException as error:
        raise ConfigurationError(str(error)) from error
