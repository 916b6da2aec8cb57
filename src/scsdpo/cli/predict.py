"""`scsdpo predict`: a policy's responses and their verdicts, as a file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from scsdpo.callbacks import PredictionWriter
from scsdpo.callbacks.prediction_writer import FORMATS
from scsdpo.cli.evaluate import Chosen, add_policy
from scsdpo.cli.lightning_cli import CLI, run_cli
from scsdpo.cli.options import new_file, own_parser


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser(
        "predict",
        "Write every response to the questions in data.val with its verdict, k = val_sampling.n "
        "to each. After a stop, the same command with the same --out goes on where it was.",
    )
    add_policy(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write, .jsonl or .parquet; without it, a new .jsonl file",
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo predict` on the command line.
    """
    given, rest = options().parse_known_args(args)
    out = new_file(given.out, *FORMATS) if given.out else None
    original = list(sys.argv)
    with Chosen(given.policy, rest) as chosen:

        class Predict(CLI):
            def instantiate_trainer(self, **kwargs: Any) -> Trainer:
                trainer = super().instantiate_trainer(**kwargs)
                callbacks = trainer.callbacks  # type: ignore[attr-defined]
                if not any(isinstance(each, PredictionWriter) for each in callbacks):
                    root = Path(trainer.default_root_dir)
                    callbacks.append(PredictionWriter(str(out or chosen.file(root, "predict"))))
                return trainer

            def run_subcommand(self, subcommand: str) -> None:
                sys.argv = original  # ranks that are launched run it again
                ckpt = self.config[subcommand].ckpt_path
                self.trainer.predict(
                    self.model, self.datamodule, return_predictions=False, ckpt_path=ckpt
                )

        sys.argv = [original[0], "predict", *chosen.args]
        run_cli(Predict)
