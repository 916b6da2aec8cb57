"""`scsdpo.load`: the objects that a run or a configuration describes."""

import contextlib
import io
import sys
from pathlib import Path

from scsdpo.checkpoints import checkpoint_in, fit_weights
from scsdpo.cli.evaluate import Chosen
from scsdpo.cli.front import check
from scsdpo.cli.lightning_cli import CLI, run_cli
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.training import PolicyOptimizer


def load(
    *configurations: str | Path, options: tuple[str, ...] = ()
) -> tuple[PolicyOptimizer, TaskDataModule]:
    """The module and the data of a run, a checkpoint or configuration files, for use in Python.

    The weights are loaded, those of the run's newest state or of the checkpoint; of configuration
    files, those of `model.policy`. The data is opened: its loaders give batches.

        module, data = scsdpo.load("runs/version_0")
        trace = module.trace(next(iter(data.train_dataloader())))

    Args:
        configurations: one run or checkpoint, or configuration files in the order of `--config`.
        options: further command-line options, such as `--data.questions_per_batch=4`; they win.

    Raises:
        ConfigurationError: in one line that names the key, as `scsdpo fit` says it.
    """
    paths = [Path(each) for each in configurations]
    if not paths:
        raise ConfigurationError("scsdpo.load: name a run, a checkpoint or configuration files")
    files = [path.suffix.lower() in (".yaml", ".yml", ".json") for path in paths]
    if not all(files) and len(paths) > 1:
        raise ConfigurationError(
            "scsdpo.load: name one run or checkpoint, or configuration files only; pass changes to "
            "a run's configuration as `options`"
        )
    if not files[0] and not paths[0].exists():
        raise ConfigurationError(f"scsdpo.load: {paths[0]} does not exist")
    rest = [f"--config={path}" for path in paths] if all(files) else []
    if not rest and checkpoint_in(paths[0]) is None:
        raise ConfigurationError(
            f"scsdpo.load: {paths[0]} is not a run, a checkpoint or a .yaml file; a policy's own "
            "folder is named in `--model.policy.name_or_path` beside a configuration"
        )
    check("predict", [*rest, *options])
    with Chosen(None if rest else str(paths[0]), [*rest, *options]) as chosen:
        module, data = _made([arg for arg in chosen.args if not arg.startswith("--ckpt_path")])
        module.configure_model()
        if chosen.saved is not None:
            own = module.state_dict()  # its tensors are the parameters
            weights = dict(chosen.saved.weights)
            fit_weights(weights, own)
            chosen.saved.fill({name: own[name] for name in weights})
    data.set_up_for(module)
    return module, data


def _made(arguments: list[str]) -> tuple[PolicyOptimizer, TaskDataModule]:
    """Build what a command line configures; LightningCLI and its messages read `sys.argv`."""
    found: list[tuple[PolicyOptimizer, TaskDataModule]] = []

    class Made(CLI):
        def run_subcommand(self, subcommand: str) -> None:
            found.append((self.model, self.datamodule))

    original, sys.argv = sys.argv, ["scsdpo", "predict", *arguments]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run_cli(Made)
    except SystemExit as stop:  # the parser exits on a mistake
        words = errors.getvalue().strip().rpartition("\n")[2]
        raise ConfigurationError(words.removeprefix("scsdpo: error: ")) from stop
    finally:
        sys.argv = original
    return found[0]
