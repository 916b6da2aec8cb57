"""Commands that run a configuration's policy on its questions without training it."""

import sys
from collections.abc import Callable, Sequence

import lightning as L

from scsdpo.cli.lightning_cli import CLI, run_cli
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.training import PolicyOptimizer

OfflineWork = Callable[[L.Trainer, PolicyOptimizer, TaskDataModule], None]


def run_offline(command: str, rest: Sequence[str], work: OfflineWork) -> None:
    """Build what `rest` configures as `scsdpo predict` would, and call `work` with it.

    Raises:
        ConfigurationError: for a mistake in the configuration, a checkpoint, or several devices.
    """
    if any(arg.startswith("--ckpt_path") for arg in rest):
        raise ConfigurationError(
            f"ckpt_path: `scsdpo {command}` runs a policy as it is loaded; write a checkpoint's "
            "with `scsdpo export` and name it in --model.policy.name_or_path"
        )

    class Offline(CLI):
        def run_subcommand(self, subcommand: str) -> None:
            if self.trainer.world_size > 1:
                raise ConfigurationError(
                    f"trainer.devices: `scsdpo {command}` runs on one device, set it to 1"
                )
            work(self.trainer, self.model, self.datamodule)

    # LightningCLI and its messages read the command line from here.
    sys.argv = ["scsdpo", "predict", *rest, "--trainer.logger=false"]
    run_cli(Offline)
