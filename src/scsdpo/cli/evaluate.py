"""`scsdpo validate` and `scsdpo test`: scores of a policy, as a table and as a file."""

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from scsdpo.checkpoints import Saved, checkpoint_in
from scsdpo.cli.lightning_cli import CLI, run_cli
from scsdpo.cli.options import check_policy, new_file, own_parser
from scsdpo.errors import blamed_on
from scsdpo.evaluation import figures, result_table
from scsdpo.io.console import Terminal
from scsdpo.training import FOLDER

EvaluationCommand = Literal["validate", "test", "predict"]
_SPLIT = {"validate": "val", "test": "test", "predict": "predictions"}


def options() -> argparse.ArgumentParser:
    """The commands' own options, beside the keys of a configuration."""
    parser = own_parser(
        "validate",
        "Ask a policy the questions in data.val with model.val_sampling, k = val_sampling.n "
        "times each: mean@k, maj@k, pass@k, well-formed and truncated responses, each with a 95 % "
        "interval, over all and by category.",
    )
    add_policy(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write; without it, a new file whose path is printed",
    )
    parser.add_argument(
        "--demonstrations",
        action="store_true",
        help="also ask with a right response of the policy in the prompt, and with one to another "
        "question; shows the gain that self-distillation can learn from",
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    `test` differs from `validate` only in the name of the split in records and loggers.

    Args:
        args: what follows `scsdpo validate` or `scsdpo test` on the command line.
    """
    command: Literal["validate", "test"] = "test" if sys.argv[1] == "test" else "validate"
    given, rest = options().parse_known_args(args)
    out = new_file(given.out, ".json") if given.out else None
    original = list(sys.argv)
    with Chosen(given.policy, rest) as chosen:

        class Evaluate(CLI):
            def run_subcommand(self, subcommand: str) -> None:
                sys.argv = original  # ranks that are launched run it again
                ckpt = self.config[subcommand].ckpt_path
                run = getattr(self.trainer, subcommand)
                run(self.model, self.datamodule, ckpt_path=ckpt, verbose=False)
                result = self.model.evaluation.result
                about = {**result.about, **chosen.about(ckpt)}
                if given.demonstrations:
                    from scsdpo.analysis.demonstrations import with_demonstrations

                    shown = with_demonstrations(self.trainer, self.model, self.datamodule)
                    result = replace(result, demonstrations=shown)
                if self.trainer.is_global_zero:
                    root = Path(self.trainer.default_root_dir)
                    file = out or chosen.file(root, command)
                    result = replace(result, about=about)
                    result.write(file)
                    console = Terminal()
                    console.print(result_table(result, figures(result.questions)))
                    console.print(f"every question and figure: {file}", soft_wrap=True)

        sys.argv = [original[0], command, *chosen.args]
        run_cli(Evaluate)


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Add the option `--policy`."""
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        help="hub name, folder, run, or checkpoint; a checkpoint brings its run's configuration. "
        "Without it: model.policy of the configuration",
    )


class Chosen:
    """The command line that runs the policy of `--policy`.

    Args:
        policy: name, folder, run or checkpoint; None: the configuration's.
        rest: the options that remain; they win over a checkpoint's configuration.

    Raises:
        ConfigurationError: if a checkpoint cannot be used.
    """

    def __init__(self, policy: str | None, rest: Sequence[str]) -> None:
        self.policy, self.args = policy, [*rest]
        self.saved: Saved | None = None
        path = checkpoint_in(Path(policy)) if policy else None
        if policy is not None and path is None:
            check_policy("--policy", policy)
        self._folder = tempfile.TemporaryDirectory(prefix="scsdpo-")
        if path is not None:
            with blamed_on("--policy"):
                self.saved = Saved.read(path)
            self.args = [*self._config(self.saved.config), *self.args, f"--ckpt_path={path}"]
        elif policy is not None:
            # A configuration needs an advantage, though none is used here.
            first = ["--model.advantage=GroupRelative"]
            self.args = [*first, *self.args, f"--model.policy.name_or_path={policy}"]
        if not any(arg.startswith("--trainer.logger") for arg in rest):
            self.args.append("--trainer.logger=false")

    def _config(self, config: Mapping[str, Any]) -> list[str]:
        kept = {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
        file = Path(self._folder.name) / "config.yaml"
        file.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
        return [f"--config={file}"]

    def __enter__(self) -> "Chosen":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def about(self, ckpt: str | None) -> dict[str, object]:
        """Origin of the policy, and the time of the evaluation."""
        return {
            "checkpoint": ckpt and str(ckpt),
            "step": self.saved.step if self.saved else None,
            "scsdpo": version("scsdpo"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def file(self, root: Path, command: EvaluationCommand) -> Path:
        """A name that is not taken: in the run's folder for a checkpoint, else under `root`."""
        suffix = "jsonl" if command == "predict" else "json"
        if self.saved is not None:
            parent = self.saved.path.parent
            root = parent.parent if parent.name == "checkpoints" else parent
            stem = f"{self.saved.path.stem}-step{self.saved.step}"
        else:
            stem = re.sub(r"[^\w.-]+", "-", self.policy or "policy").strip("-")
        folder = root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        name, number = f"{stem}-{_SPLIT[command]}", 1
        while (path := folder / f"{name}{f'-{number}' if number > 1 else ''}.{suffix}").exists():
            number += 1
        return path
