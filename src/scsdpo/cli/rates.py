"""`scsdpo rates`: measure pass rates of the training questions, for `FrozenPassRate`."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import lightning as L

from scsdpo.cli.offline import run_offline
from scsdpo.cli.options import new_file, own_parser
from scsdpo.data import TaskDataModule
from scsdpo.io.files import write_object
from scsdpo.training import PolicyOptimizer
from scsdpo.weighting.frozen import FORMAT, fingerprint


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser("rates", "Measure the pass rate of every training question, once.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file to write, e.g. rates.json"
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo rates` on the command line.
    """
    given, rest = options().parse_known_args(args)
    out = new_file(given.out, ".json")

    def work(trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule) -> None:
        write_object(out, measure(trainer, model, data))
        print(out)

    run_offline("rates", rest, work)


def measure(trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule) -> dict[str, object]:
    """Ask every training question once, with as many rollouts a question as in training.

    Returns:
        The file that `FrozenPassRate` reads: the policy, and successes and rollouts by question.
    """
    # Prediction asks the validation questions with the validation's sampling. Training draws
    # batches from 1 on, so the draws of batch 0 are never repeated in training.
    data.val_sources = data.train_sources
    model.val_sampling = model.sampling.at(0)
    rates: dict[str, list[int]] = {}
    for records in trainer.predict(model, data) or []:
        for record in records:
            counts = rates.setdefault(record["key"], [0, 0])
            counts[0] += record["reward"] >= model.success_threshold
            counts[1] += 1
    return {
        "format": FORMAT,
        "policy": model.policy.name_or_path,
        "fingerprint": fingerprint(model.policy.wrapped),
        "sampling": asdict(model.sampling),
        "rates": rates,
    }
