"""`scsdpo check`: say before training whether this policy can teach itself this task."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.table import Table

from scsdpo.analysis.readiness import Readiness, measure_readiness
from scsdpo.analysis.verdict import Remark, verdict
from scsdpo.cli.offline import run_offline
from scsdpo.cli.options import new_file, own_parser
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.io.console import Terminal
from scsdpo.io.files import write_whole
from scsdpo.records.jsonl import with_nulls
from scsdpo.statistics import Estimate
from scsdpo.training import PolicyOptimizer

SCHEMA_VERSION = 3


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser(
        "check",
        "Before training: ask training questions with model.sampling, let the configured teacher "
        "answer them, too, and compare the first step with the gradient of the expected reward on "
        "other questions. Print what would keep the policy from learning, and what to change.",
    )
    add = parser.add_argument
    add(
        "--questions",
        metavar="N",
        type=int,
        default=32,
        help="training questions to ask, at most (32)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("check.json"),
        help="JSON file for all figures (check.json)",
    )
    add(
        "--no-direction",
        action="store_true",
        help="do not compare the first step with the reward's gradient: saves six backward passes",
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo check` on the command line.
    """
    given, rest = options().parse_known_args(args)
    if given.questions < 2:
        raise ConfigurationError(f"--questions must be >= 2, got {given.questions}")
    out = new_file(given.out, ".json")

    def work(trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule) -> None:
        found = measure_readiness(
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
        write_whole(out, json.dumps(with_nulls(record), ensure_ascii=False, indent=1) + "\n")
        show(found, remarks, Terminal())
        print(f"every figure: {out}")

    run_offline("check", rest, work)


def show(found: Readiness, remarks: Sequence[Remark], console: Console) -> None:
    """Print the figures as a table, and the verdict below it."""
    own = found.answers
    rows = [
        ("questions x responses", f"{own.questions} x {own.group}"),
        ("responses with an answer", _share(own.formed)),
        ("responses that reach the cap", _share(own.truncated)),
        ("mean length, tokens", f"{own.length:.0f}"),
        ("right", _estimate(own.pass_rate, _share)),
        ("questions all right, none right", f"{_share(own.mastered)}, {_share(own.hopeless)}"),
    ]
    if not math.isnan(found.taught):
        rows += [
            ("responses that are taught", _share(found.taught)),
            ("of their tokens in cut-off ones", _share(found.taught_truncated)),
            ("teacher prefers right ones (AUC)", _number(found.preference, "{:.2f}")),
        ]
    names = {
        "configured": "teacher, as configured",
        "another": "told of another question",
        "gold": "told the data's answer",
        "feedback": "told what was wrong",
    }
    for name, one in found.told.items():
        rows.append((names[name], f"{_share(one.told.value)} (own {_share(one.without.value)})"))
    if (way := found.directions) is not None:
        rows += [
            ("first step with the reward's gradient", _estimate(way.step, _cosine)),
            ("that gradient with itself", _cosine(way.reward)),
            ("first step with growing length", _estimate(way.length, _cosine)),
            (f"one step at {way.lr:.2g} moves the policy by", _number(way.shift, "{:.2g} nats")),
        ]
    table = Table(show_header=False, title="before training", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for remark in remarks:
        remedy = f" -> {remark.remedy}" if remark.remedy else ""
        console.print(
            f"{remark.level}: {remark.text}{remedy}", markup=False, highlight=False, soft_wrap=True
        )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _share(value: float) -> str:
    return _number(value, "{:.0%}")


def _cosine(value: float) -> str:
    return _number(value, "{:+.3f}")


def _estimate(found: Estimate, shown: Callable[[float], str]) -> str:
    known = "" if math.isnan(found.low) else f" ({shown(found.low)} .. {shown(found.high)})"
    return shown(found.value) + known
