"""`scsdpo check`: before training, whether this policy can teach itself this task."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.table import Table

from scsdpo.analysis.readiness import Readiness, measure
from scsdpo.analysis.verdict import Remark, verdict
from scsdpo.cli.offline import run_offline
from scsdpo.cli.options import new_file, own_parser
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.training import PolicyOptimizer

SCHEMA_VERSION = 1


def options() -> argparse.ArgumentParser:
    """What the command takes beside the keys of a configuration."""
    parser = own_parser(
        "check",
        "Before training: ask training questions with model.sampling, let the configured teacher "
        "answer them, too, and compare the first step with the gradient of the expected reward on "
        "other questions. Says in words what is in the way, and what to change.",
    )
    add = parser.add_argument
    add("--questions", metavar="N", type=int, default=32, help="at most so many")
    add("--out", type=Path, metavar="FILE", default=Path("check.json"), help="all figures")
    add("--no-direction", action="store_true", help="without the six backward passes")
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo check` on the command line.
    """
    given, rest = options().parse_known_args(args)
    if given.questions < 2:
        raise ConfigurationError(f"--questions must be >= 2, got {given.questions}")
    out = new_file(given.out)

    def work(trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule) -> None:
        found = measure(
            trainer, model, data, given.questions, with_directions=not given.no_direction
        )
        remarks = verdict(found)
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": "check",
            "policy": model.policy.name_or_path,
            "verdict": [vars(remark) for remark in remarks],
            **asdict(found),
        }
        out.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        show(found, remarks, Console())
        print(f"every figure: {out}")

    run_offline("check", rest, work)


def show(found: Readiness, remarks: Sequence[Remark], console: Console) -> None:
    """The figures as a table, and the verdict below."""
    own = found.answers
    rows = [
        ("questions x responses", f"{own.questions} x {own.group}"),
        ("responses with an answer", f"{own.formed:.0%}"),
        ("responses that reach the cap", f"{own.truncated:.0%}"),
        ("mean length, tokens", f"{own.length:.0f}"),
        (
            "right",
            f"{own.pass_rate.value:.0%} ({own.pass_rate.low:.0%} .. {own.pass_rate.high:.0%})",
        ),
        ("questions all right, none right", f"{own.mastered:.0%}, {own.hopeless:.0%}"),
    ]
    if found.told or found.taught:
        rows += [
            ("responses that are taught", f"{found.taught:.0%}"),
            ("of their tokens in cut-off ones", f"{found.taught_truncated:.0%}"),
            ("teacher prefers right ones (AUC)", f"{found.preference:.2f}"),
        ]
    names = {
        "configured": "teacher, as configured",
        "another": "told of another question",
        "gold": "told the data's answer",
        "feedback": "told what was wrong",
    }
    for name, one in found.told.items():
        rows.append((names[name], f"{one.told.value:.0%} (own {one.without.value:.0%})"))
    if found.directions is not None:
        cosines = ", ".join(f"{value:+.3f}" for value in found.directions.step)
        rows.append(("first step with the reward's gradient", cosines))
        rows.append(("that gradient with itself", f"{found.directions.reward:+.3f}"))
        lengths = ", ".join(f"{value:+.3f}" for value in found.directions.length)
        rows.append(("first step with growing length", lengths))
    table = Table(show_header=False, title="before training", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for remark in remarks:
        remedy = f" -> {remark.remedy}" if remark.remedy else ""
        console.print(
            f"{remark.level}: {remark.text}{remedy}", markup=False, highlight=False, soft_wrap=True
        )
