"""`scsdpo analyze`: distance of the teacher from the policy, by correctness and pass rate."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from scsdpo.analysis.teacher_distance import measure_distances
from scsdpo.cli.offline import run_offline
from scsdpo.cli.options import own_parser
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.io.files import write_object
from scsdpo.training import PolicyOptimizer


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser(
        "analyze",
        "Sample responses to the validation questions, and measure how far the configured teacher "
        "is from the policy on each: means over a response's tokens.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add(
        "--questions",
        metavar="N",
        type=int,
        default=128,
        help="validation questions to ask, at most (128)",
    )
    add("--rollouts", metavar="N", type=int, default=16, help="responses to each question (16)")
    add("--no-plot", action="store_true", help="write numbers and no plots, which need matplotlib")
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo analyze` on the command line.
    """
    given, rest = options().parse_known_args(args)
    for name in ("questions", "rollouts"):
        if getattr(given, name) < 1:
            raise ConfigurationError(f"--{name} must be >= 1, got {getattr(given, name)}")
    plot = None if given.no_plot else _plotter()

    def work(trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule) -> None:
        report = measure_distances(trainer, model, data, given.questions, given.rollouts)
        write_object(given.out / "analysis.json", report)
        if plot is not None:
            plot(report, given.out / "analysis.png")
        print(given.out)

    run_offline("analyze", rest, work)


def _plotter() -> Callable[[dict[str, Any], Path], None]:
    try:
        from scsdpo.analysis.figures import plot_analysis
    except ImportError as error:
        raise ConfigurationError(
            f"plots need matplotlib ({error}): pip install 'scsdpo[report]', or say --no-plot"
        ) from error
    return plot_analysis
