"""`scsdpo compare`: compare policies by question, or methods by seed, and make the runs for it."""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scsdpo.checkpoints import checkpoint_in
from scsdpo.cli.options import check_policy, new_file, own_parser
from scsdpo.comparison import (
    Job,
    PairedComparison,
    SeedRow,
    answers_table,
    by_seed,
    compare_questions,
    execute,
    figures_table,
    run_all,
    seeds_table,
)
from scsdpo.errors import ConfigurationError, TrainingStopped, blamed_on
from scsdpo.evaluation import EvaluatedQuestion, Result
from scsdpo.io.console import Terminal
from scsdpo.io.files import write_whole
from scsdpo.prompt import stable_hash

SCHEMA_VERSION = 1
_SEED = re.compile(r"seed_?(\d+)")
_VALIDATION = re.compile(r"val-(\d+)\.json")


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser(
        "compare_questions",
        "Compare policies question by question, the first one with each other: evaluations "
        "(files of scsdpo validate), runs (their last validation), checkpoints, folders, hub "
        "names (evaluated here, with the options that follow). Folders that hold seed0, seed1, "
        "... are methods, which are compared seed by seed. --configs makes such folders.",
    )
    parser.add_argument(
        "things",
        nargs="*",
        metavar="A B",
        help="evaluation files, runs, checkpoints, folders or hub names to compare",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="configuration file of every evaluation or run",
    )
    parser.add_argument(
        "--configs",
        nargs="+",
        default=[],
        help="a configuration file for each method; it wins over --config",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        help="number of runs of each method, with seeds 0, 1, ... (5)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (1)")
    parser.add_argument(
        "--show", type=int, default=5, help="won questions to show, and as many lost ones (5)"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; with --configs, the folder of the runs"
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo compare` on the command line.
    """
    given, rest = options().parse_known_args(args)
    rest = [*(f"--config={file}" for file in given.config), *rest]
    _check(given)
    if given.configs:
        folder = given.out or Path("runs/compare")
        things = [str(path) for path in train(given, rest, folder)]
        out, rest = folder / "comparison.json", []
    else:
        things = given.things
        out = new_file(given.out or Path("runs/comparison.json"), ".json")
    methods = [seeds_in(Path(thing)) for thing in things]
    for thing, seeds in zip(things, methods, strict=True):
        if not seeds and not evaluation_in(Path(thing)) and not checkpoint_in(Path(thing)):
            check_policy("compare", thing)  # before others are evaluated, which takes minutes
    if all(methods):
        record = _methods(dict(zip(things, methods, strict=True)))
    elif any(methods):
        others = [thing for thing, seeds in zip(things, methods, strict=True) if not seeds]
        raise ConfigurationError(
            "compare: folders of seeds can only be compared with folders of seeds, got "
            f"{', '.join(others)} too"
        )
    else:
        record = _policies({thing: evaluated(thing, rest) for thing in things}, given.show)
    record = {"schema_version": SCHEMA_VERSION, "kind": "comparison", **record}
    write_whole(out, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    print(f"everything that was compared: {out}")


def _check(given: argparse.Namespace) -> None:
    for name in ("seeds", "jobs"):
        if getattr(given, name) < 1:
            raise ConfigurationError(f"--{name} must be >= 1, got {getattr(given, name)}")
    many = given.configs or given.things
    if given.configs and given.things:
        raise ConfigurationError("compare: give either --configs or existing results, not both")
    if len(many) < 2 or len(set(many)) < len(many):
        got = ", ".join(many) or "none"
        raise ConfigurationError(
            f"compare: name two or more, each once (policies, or --configs); got {got}"
        )
    names = [Path(config).stem for config in given.configs]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"--configs: names must differ, got {', '.join(names)}")
    for config in [*given.config, *given.configs]:
        if not Path(config).is_file():
            raise ConfigurationError(f"--configs: {config} does not exist")


def train(given: argparse.Namespace, rest: Sequence[str], folder: Path) -> list[Path]:
    """Run every method and seed that is not done yet; returns the methods' folders."""
    methods = {Path(config).stem: Path(config) for config in given.configs}
    jobs = [
        job(folder, name, seed, [*rest, f"--config={config}"])
        for seed in range(given.seeds)
        for name, config in methods.items()
    ]
    try:
        failed = run_all(jobs, given.jobs, lambda text: print(text, flush=True))
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if failed:
        raise TrainingStopped(f"{len(failed)} of {len(jobs)} runs failed; run it again to go on")
    return [folder / name for name in methods]


def job(folder: Path, name: str, seed: int, words: Sequence[str]) -> Job:
    """The run of a method with a seed, in `FOLDER/NAME/seedN`."""
    into = folder / name / f"seed{seed}"
    own = (
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={into}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    )
    return Job(name=f"{name}, seed {seed}", folder=into, words=(*words, *own))


def evaluated(thing: str, rest: Sequence[str]) -> Result:
    """The evaluation in `thing`; if there is none, `scsdpo validate` makes one, once."""
    path = Path(thing)
    if evaluation_in(path) and not rest:
        return read(path)
    checkpoint = checkpoint_in(path)
    changed = (checkpoint or path).stat().st_mtime_ns if path.exists() else 0
    digest = stable_hash(thing, changed, *rest)
    root = Path("runs")
    if checkpoint is not None:
        parent = checkpoint.parent
        root = parent.parent if parent.name == "checkpoints" else parent
    out = root / "evaluations" / f"{path.stem}-{digest:016x}.json"
    if not out.exists():
        command = [sys.executable, "-m", "scsdpo", "validate", f"--policy={thing}"]
        try:
            execute([*command, f"--out={out}", *rest], out.with_suffix(".txt"))
        except RuntimeError as error:
            raise ConfigurationError(f"compare: {thing} could not be evaluated: {error}") from error
    return read(out)


def evaluation_in(path: Path) -> Path | None:
    """`path` itself if it is an evaluation's file, or a run's last validation; None: neither."""
    if path.is_file() and path.suffix == ".json":
        return path
    found = [(int(m[1]), file) for file in (path / "evaluations").glob("val-*.json")
             if (m := _VALIDATION.fullmatch(file.name))]  # fmt: skip
    return max(found)[1] if found else None


def seeds_in(path: Path) -> dict[int, Path]:
    """Folders `seed0`, `seed1`, ... of a method by seed; empty if `path` holds none."""
    if not path.is_dir():
        return {}
    matches = ((_SEED.fullmatch(folder.name), folder) for folder in path.iterdir())
    found = {int(match[1]): folder for match, folder in matches if match and folder.is_dir()}
    return dict(sorted(found.items()))


def read(path: Path) -> Result:
    """Read the evaluation at `path`.

    Raises:
        ConfigurationError: if there is none.
    """
    with blamed_on("compare"):
        found = evaluation_in(path)
        if found is None:
            raise ValueError(f"{path} holds no evaluation")
        return Result.read(found)


def _policies(found: Mapping[str, Result], show: int) -> dict[str, Any]:
    console = Terminal()
    (first, baseline), *others = found.items()
    duels = []
    for name, result in others:
        for key in ("sampling", "batch"):
            a, b = baseline.about.get(key), result.about.get(key)
            if a != b:
                console.print(f"note: {key} differs: {a} | {b}", markup=False, highlight=False)
        compared = compare_questions(baseline, result, names=(first, name))
        console.print(figures_table((first, name), compared.rows))
        if show and (compared.won or compared.lost):
            console.print(answers_table(compared, ("first", "second"), show))
        duels.append({"a": first, "b": name, **_record(compared)})
    _say_comparisons(console, sum(len(one["rows"]) for one in duels))
    return {"baseline": first, "duels": duels}


def _record(compared: PairedComparison) -> dict[str, Any]:
    def side(question: EvaluatedQuestion) -> dict[str, Any]:
        kept = ("rewards", "answers", "response")
        return {name: getattr(question, name) for name in kept}

    def listed(
        pairs: Sequence[tuple[EvaluatedQuestion, EvaluatedQuestion]],
    ) -> list[dict[str, Any]]:
        return [
            {"key": a.key, "question": a.question, "gold": a.gold, "a": side(a), "b": side(b)}
            for a, b in pairs
        ]

    rows = [asdict(row) for row in compared.rows]
    return {"rows": rows, "won": listed(compared.won), "lost": listed(compared.lost)}


def _methods(found: Mapping[str, Mapping[int, Path]]) -> dict[str, Any]:
    console = Terminal()
    read_all = {name: {s: read(path) for s, path in runs.items()} for name, runs in found.items()}
    _check_same(read_all)
    figures = {
        name: {seed: totals(result) for seed, result in runs.items()}
        for name, runs in read_all.items()
    }
    first, *others = figures
    some = next(iter(figures[first].values()))
    names = [name for name in some if name not in ("well_formed", "pass@1")]
    comparisons = len(names) * len(others)
    rows: dict[str, list[SeedRow]] = {
        other: by_seed(figures[first], figures[other], names, comparisons=comparisons)
        for other in others
    }
    console.print(seeds_table(first, rows))
    _say_comparisons(console, comparisons)
    return {
        "baseline": first,
        "figures": figures,
        "comparisons": comparisons,
        "methods": {name: [asdict(row) for row in one] for name, one in rows.items()},
    }


def _check_same(found: Mapping[str, Mapping[int, Result]]) -> None:
    """Refuse runs whose last validations differ in batches trained or in questions."""
    results = [(f"{n}, seed {s}", r) for n, runs in found.items() for s, r in runs.items()]
    name, first = results[0]
    for other, result in results[1:]:
        for what, a, b in (
            ("batches before its last validation", first.about["batch"], result.about["batch"]),
            ("questions", [q.key for q in first.questions], [q.key for q in result.questions]),
        ):
            if a != b:
                said = f": {a} and {b}" if what != "questions" else ""
                raise ConfigurationError(
                    f"compare: {name} and {other} must have the same {what}{said}"
                )
    shared = set.intersection(*(set(runs) for runs in found.values()))
    if not shared:
        raise ConfigurationError("compare: the methods have no seed in common")


def totals(result: Result) -> dict[str, float]:
    """Mean of every score over all questions."""
    rows = [question.scores() for question in result.questions]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _say_comparisons(console: Terminal, count: int) -> None:
    console.print(
        f"{count} intervals, of which {0.05 * count:.1f} are expected to miss by chance. * 0 lies "
        "outside the interval; ** also outside the interval corrected for all of them "
        "(Bonferroni). Findable: the smallest true difference that 4 of 5 such experiments find.",
        markup=False,
        highlight=False,
    )
