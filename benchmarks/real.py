"""What does each method do to a language model that others trained? SmolLM2, paired by seed.

    python benchmarks/real.py [--policy DIR] [--methods grpo sdpo mine.yaml] [--seeds 3] [--jobs 2]
                              [--out DIR] [--report DIR]

Every run is `scsdpo fit` with configs/smollm2.yaml, the method's file over it, and nothing else
changed: the same start, questions, number of steps, learning rate and held-out questions. The seed
sets the order of questions and every draw. DIR is a folder with HuggingFaceTB/SmolLM2-135M-Instruct
or any other policy; without it the hub's.

Runs are those of `scsdpo compare --configs`: what is in --out already is not done again, a stopped
benchmark goes on, seeds and methods can be added, and any two of --out/METHOD can be given to
`scsdpo compare`. Writes real.json (a row a run) and real.md (the tables) into --report.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from study import overlay
from study_report import by_method, differences, differences_table, table

from scsdpo.cli.compare import job
from scsdpo.comparison import DONE, Job, run_all

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("grpo", "sdpo", "sdpo-drop-degenerate", "sc-sdpo", "srpo", "sdpo-hybrid")
ENDS = {"mean@8": "mean@8, %", "maj@8": "maj@8, %"}
WINDOW = 5
"""Batches at either end of training whose mean is shown."""
TRAINING = {
    "pass_rate": "pass rate",
    "entropy": "entropy",
    "truncated": "truncated",
    "response_length": "length",
}


def jobs(args: argparse.Namespace) -> dict[Job, tuple[str, int]]:
    """A run for each seed and method; one seed of all methods before the next."""
    words = [
        f"--config={ROOT / 'configs' / 'smollm2.yaml'}",
        *([f"--model.policy.name_or_path={args.policy}"] if args.policy else []),
        "--checkpoint.save_last=false",
        "--checkpoint.save_top_k=0",
    ]
    found = {}
    for seed in range(args.seeds):
        for method in args.methods:
            name = Path(method).stem
            run = job(args.out, name, seed, [*words, f"--config={overlay(method)}"])
            found[run] = (name, seed)
    return found


def result(run: Job, method: str, seed: int) -> dict:
    """The numbers of a run that is done."""
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    val = [row for row in log if "val/mean@8" in row]
    train = [row for row in log if "train/pass_rate" in row]
    found: dict = {"method": method, "seed": seed}
    found["cpu_seconds"] = json.loads((run.folder / DONE).read_text())["cpu_seconds"]
    found["batches"] = len(train)
    for name in ENDS:
        found[name] = val[-1][f"val/{name}"]
        found[f"{name} before"] = val[0][f"val/{name}"]
    found["validation"] = {row["batch"]: row["val/mean@8"] for row in val}
    for name in TRAINING:
        series = [row[f"train/{name}"] for row in train if f"train/{name}" in row]
        found[name] = [statistics.fmean(series[:WINDOW]), statistics.fmean(series[-WINDOW:])]
    found["warnings"] = warnings(run.folder)
    return found


def warnings(folder: Path) -> dict[str, int]:
    """Of each health rule that spoke, the batch at which it did first."""
    file = folder / "health.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row["rule"], row["batch"])
    return first


def ends_table(results: Sequence[dict]) -> str:
    """Held-out accuracy: before, after (mean, worst seed), and what training looked like."""
    rows: list[list[object]] = []
    for method, runs in by_method(results).items():
        cells: list[object] = [method, len(runs)]
        for name in ENDS:
            after = [100 * run[name] for run in runs]
            spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
            cells.append(f"{statistics.fmean(after):.1f}{spread}")
        gains = [100 * (run["mean@8"] - run["mean@8 before"]) for run in runs]
        cells += [f"{statistics.fmean(gains):+.1f}", f"{min(gains):+.1f}"]
        for name in TRAINING:
            first, last = (statistics.fmean(run[name][i] for run in runs) for i in (0, 1))
            cells.append(
                f"{first:.2f} -> {last:.2f}" if last < 10 else f"{first:.0f} -> {last:.0f}"
            )
        minutes = statistics.fmean(run["cpu_seconds"] for run in runs) / 60
        rows.append([*cells, f"{minutes:.0f}"])
    names = ["method", "seeds", *ENDS.values(), "gain", "worst seed", *TRAINING.values()]
    return table([*names, "CPU min"], rows)


def warnings_table(results: Sequence[dict]) -> str:
    """When the rules of training spoke first, by seed."""
    rows = [
        [run["method"], run["seed"], said]
        for run in results
        if (said := ", ".join(f"{rule} at {batch}" for rule, batch in run["warnings"].items()))
    ]
    return table(["method", "seed", "health rules, at batch"], rows)


def markdown(results: Sequence[dict], baselines: Sequence[str]) -> str:
    """All tables."""
    before = statistics.fmean(run["mean@8 before"] for run in results)
    majority = statistics.fmean(run["maj@8 before"] for run in results)
    hours = sum(run["cpu_seconds"] for run in results) / 3600
    said = (
        f"Before training: mean@8 {100 * before:.1f} %, maj@8 {100 * majority:.1f} %. "
        f"{len(results)} runs of {results[0]['batches']} batches, {hours:.1f} CPU hours. Pass "
        f"rate, entropy, truncated, length: of the first and the last {WINDOW} training batches.\n"
    )
    parts = [said, ends_table(results)]
    told = [row for row in differences(results, ENDS) if row["n"] > 1]
    parts += [differences_table(told, baseline, ENDS) for baseline in baselines]
    return "\n".join([*parts, warnings_table(results)])


def parsed(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", help="folder or name; of configs/smollm2.yaml otherwise")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names or files")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--report", type=Path, help="folder of the tables, if not --out")
    parser.add_argument("--baselines", nargs="+", default=["grpo", "sdpo"])
    given = parser.parse_args(args)
    unknown = [method for method in given.methods if not overlay(method).is_file()]
    if unknown:
        parser.error(f"--methods: {unknown[0]} is no file, and none of configs/methods")
    return given


def main() -> None:
    args = parsed()
    args.out = args.out.resolve()
    todo = jobs(args)
    failed = run_all(list(todo), args.jobs, lambda said: print(said, file=sys.stderr, flush=True))
    results = [result(run, *cell) for run, cell in todo.items() if run not in failed]
    order = {Path(method).stem: place for place, method in enumerate(args.methods)}
    results.sort(key=lambda run: (order[run["method"]], run["seed"]))
    report = args.report or args.out
    report.mkdir(parents=True, exist_ok=True)
    if results:
        known = {run["method"] for run in results}
        baselines = [one for one in args.baselines if one in known]
        (report / "real.json").write_text(json.dumps(results, indent=1) + "\n")
        (report / "real.md").write_text(markdown(results, baselines))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(todo)} runs failed; run it again")


if __name__ == "__main__":
    main()
