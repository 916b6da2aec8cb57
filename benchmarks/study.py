"""Compare methods on the same policy, questions and steps, paired by seed.

    python benchmarks/study.py [--methods grpo sdpo mine.yaml] [--seeds 5] [--batches 150]
                               [--lrs 1e-5 3e-5 1e-4 3e-4] [--grid-seeds 1] [--jobs 2] [--out DIR]
                               [--base tiny]

1. The start: the policy that ships with the package, warmed up further so that it has mastered
   some of the lab's questions, wavers on some and finds some out of reach (`pretrain.py`).
   With `--base tiny-tools`, where the lab's store is worked in several turns: the policy that ships
   for that, as it is.
2. `scsdpo rates` on the training questions: its pass rates before training; PACED needs them.
3. A grid of learning rates, the same for every method: short runs with seeds and held-out
   questions of their own. Each method takes the rate with the best mean. One rate: no grid.
4. The runs: (method, seed) is one `scsdpo fit` with configs/BASE.yaml, in a process of its own,
   over the same training questions, each once. The seed sets their order and every draw.

Runs are those of `scsdpo compare --configs`: whatever is in --out already is not done again, a
stopped study goes on, and seeds, methods or rates can be added. Any two of --out/runs/RATE/METHOD
can be given to `scsdpo compare`. Writes study.json (a row a run, all paired differences), study.md
(the tables) and plots into --report. Needs matplotlib: pip install 'scsdpo[report]'.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import study_report

from scsdpo.comparison import DONE, Job, execute, run_all
from scsdpo.policy.location import SHIPPED, TINY

ROOT = Path(__file__).resolve().parents[1]
METHODS = (
    "grpo",
    "grpo-no-norm",
    "sdpo",
    "sdpo-paced",
    "sdpo-hard-filter",
    "sdpo-drop-degenerate",
    "srpo",
    "sc-sdpo",
    "sc-sdpo-1",
)
"""The methods that the paper compares, and the control that it lacks."""
START = ("--start", "tiny", "--steps", "300", "--lr", "1.5e-3", "--avoided", ".5", "--fatal", ".12")
WINDOW = 50
"""Batches of a window of the pass-rate distribution, as in the paper."""
QUESTIONS = 16
"""Questions of a batch."""
GRID_SEED = 1000
"""Seeds of the grid: this one and the next."""


def start_policy(out: Path, base: str) -> Path:
    """Step 1: the folder of the policy that every run starts from."""
    if base != TINY:
        return SHIPPED[base]
    folder = out / "start"
    if not (folder / "record.json").exists():
        script = Path(__file__).with_name("pretrain.py")
        words = [sys.executable, str(script), "--out", str(folder), *START]
        execute(words, out / "start.txt")
    return folder


def start_rates(out: Path, base: str, start: Path, questions: int) -> list[float]:
    """Step 2: the pass rates of the training questions before training; their file is in `out`."""
    file = out / "rates.json"
    if not file.exists():
        options = (
            f"--out={file}",
            f"--data.train.size={questions}",
            f"--model.policy.name_or_path={start}",
        )
        words = [sys.executable, "-m", "scsdpo", "rates", f"--config={configuration(base)}"]
        execute([*words, *options], out / "rates.txt")
    rates = [right / of for right, of in json.loads(file.read_text())["rates"].values()]
    if len(rates) != questions:
        raise SystemExit(
            f"{file} has {len(rates)} questions, not {questions}: choose another --out"
        )
    return rates


def job(
    args: argparse.Namespace, folder: Path, method: str, lr: float, seed: int, **keys: object
) -> Job:
    """One training run: every training question once, in an order of its own."""
    into = folder / f"{lr:g}" / Path(method).stem / f"seed{seed}"
    keys = {
        "seed_everything": seed,
        "data.questions_per_batch": QUESTIONS,
        "model.policy.name_or_path": args.start,
        "model.optimizer.lr": lr,
        "trainer.default_root_dir": into,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "checkpoint.save_last": "false",
        **keys,
    }
    if method == "dapo":
        keys["model.selection.questions"] = QUESTIONS
    if method == "sdpo-paced":
        keys["model.weighting.path"] = args.out / "rates.json"
    words = [f"--config={configuration(args.base)}", f"--config={overlay(method)}"]
    words += [f"--{key}={value}" for key, value in keys.items()]
    return Job(name=f"{method}, seed {seed}, lr {lr:g}", folder=into, words=tuple(words))


def configuration(base: str) -> Path:
    """Configuration file that every run has in common."""
    return ROOT / "configs" / f"{base}.yaml"


def overlay(method: str) -> Path:
    """A file of one's own, or the name of one in configs/methods."""
    return Path(method) if Path(method).is_file() else ROOT / "configs/methods" / f"{method}.yaml"


def jobs(
    args: argparse.Namespace,
    folder: Path,
    cells: Sequence[tuple[str, float]],
    seeds: range,
    *,
    batches: int,
    val_size: int,
    val_every: int,
    val_seed: int,
) -> dict[Job, tuple[str, float, int]]:
    """A run for each seed and (method, rate)."""
    keys = {
        "data.train.size": batches * QUESTIONS,
        "data.val.seed": val_seed,
        "data.val.size": val_size,
        "trainer.limit_train_batches": batches,
        "trainer.val_check_interval": val_every,
    }
    return {
        job(args, folder, method, lr, seed, **keys): (method, lr, seed)
        for seed in seeds
        for method, lr in cells
    }


def result(run: Job, method: str, lr: float, seed: int) -> dict:
    """The numbers of a run that is done."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    found = {"method": Path(method).stem, "seed": seed, "setting": {"lr": lr}}
    found["cpu_seconds"] = json.loads((run.folder / DONE).read_text())["cpu_seconds"]
    return found | summary([json.loads(line) for line in lines])


def summary(log: Sequence[dict[str, float]]) -> dict:
    """Numbers of the whole run, and curves, from its metrics.jsonl; line 0 is before training."""
    train = [row for row in log if "train/pass_rate" in row]
    val = [row for row in log if "val/mean@16" in row]
    last = {k.removeprefix("val/"): v for k, v in val[-1].items() if k.startswith("val/")}

    def series(name: str) -> list[float]:
        return [row[f"train/{name}"] for row in train if f"train/{name}" in row]

    def windows(name: str) -> list[float]:
        values = series(name)
        return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values), WINDOW)]

    shares = ("solve_none", "informative", "solve_all", "medium", "central")
    lengths, norms = series("response_length"), series("gradient_norm")
    return {
        **last,
        "before": val[0]["val/mean@16"],
        "response_length": statistics.fmean(lengths[-WINDOW:]),
        "gradient_norm": statistics.fmean(norms) if norms else 0.0,
        "trained_rollouts": sum(series("trained_rollouts")),
        "trained_tokens": sum(series("trained_tokens")),
        "steps": len(norms),
        "windows": {name: windows(name) for name in shares},
        "validated_at": [int(row["batch"]) for row in val],
        "validation": {name: [row[f"val/{name}"] for row in val] for name in last},
        "training": {
            "pass_rate": series("pass_rate"),
            "response_length": lengths,
            "gradient_norm": norms,
            "trained_rollouts": series("trained_rollouts"),
            **{name: series(name) for name in shares},
        },
    }


def run_and_read(todo: dict[Job, tuple[str, float, int]], processes: int) -> list[dict]:
    """The results of the runs that did not fail."""
    failed = run_all(list(todo), processes, lambda said: print(said, file=sys.stderr, flush=True))
    return [result(run, *cell) for run, cell in todo.items() if run not in failed]


def grid(args: argparse.Namespace) -> dict[tuple[str, float], list[float]]:
    """Step 3: final mean@16 of every method at every rate, a value a grid seed."""
    todo = jobs(
        args,
        args.out / "grid",
        [(method, lr) for method in args.methods for lr in args.lrs],
        range(GRID_SEED, GRID_SEED + args.grid_seeds),
        batches=args.grid_batches,
        val_size=min(256, args.val_size),
        val_every=args.grid_batches,
        val_seed=1,
    )
    results = run_and_read(todo, args.jobs)
    refuse_failures(results, todo)
    found: dict[tuple[str, float], list[float]] = {}
    for one in results:
        found.setdefault((one["method"], one["setting"]["lr"]), []).append(one["mean@16"])
    return found


def refuse_failures(results: Sequence[dict], todo: dict) -> None:
    """End here if runs failed."""
    if len(results) < len(todo):
        raise SystemExit(f"{len(todo) - len(results)} of {len(todo)} runs failed; run it again")


def chosen(found: dict[tuple[str, float], list[float]]) -> dict[str, float]:
    """Each method's rate with the highest mean; the lower one of equals."""
    rates: dict[str, float] = {}
    for method in dict.fromkeys(method for method, _ in found):
        own = {lr: statistics.fmean(v) for (m, lr), v in found.items() if m == method}
        rates[method] = max(sorted(own), key=own.__getitem__)
    return rates


def parsed(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names or files")
    parser.add_argument("--base", choices=SHIPPED, default=TINY, help="of configs: the task")
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--batches", type=int, default=150, help="of 16 questions")
    parser.add_argument("--val-every", type=int, default=50, help="batches between validations")
    parser.add_argument("--val-size", type=int, default=512, help="held-out questions")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4])
    parser.add_argument("--grid-seeds", type=int, default=1)
    parser.add_argument("--grid-batches", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, a thread each")
    parser.add_argument("--report", type=Path, help="folder of tables and plots, if not --out")
    parser.add_argument("--baselines", nargs="+", default=["sdpo", "sdpo-drop-degenerate"])
    given = parser.parse_args(args)
    known = sorted(p.stem for p in (ROOT / "configs" / "methods").glob("*.yaml"))
    unknown = [method for method in given.methods if not overlay(method).is_file()]
    if unknown:
        parser.error(f"--methods: {unknown[0]} is no file, and none of {', '.join(known)}")
    if len(given.lrs) > 1 and given.grid_batches > given.batches:
        parser.error("--grid-batches must not exceed --batches: PACED knows their questions only")
    if given.batches % given.val_every:
        parser.error("--batches must be a multiple of --val-every: the last validation is the end")
    return given


def main() -> None:
    args = parsed()
    args.out = args.out.resolve()
    args.start = start_policy(args.out, args.base)
    rates = start_rates(args.out, args.base, args.start, QUESTIONS * args.batches)
    found = grid(args) if len(args.lrs) > 1 else {}
    stems = [Path(method).stem for method in args.methods]
    best = chosen(found) if found else dict.fromkeys(stems, args.lrs[0])
    todo = jobs(
        args,
        args.out / "runs",
        [(method, best[Path(method).stem]) for method in args.methods],
        range(args.seeds),
        batches=args.batches,
        val_size=args.val_size,
        val_every=args.val_every,
        val_seed=0,
    )
    results = run_and_read(todo, args.jobs)
    order = {stem: i for i, stem in enumerate(stems)}
    results.sort(key=lambda r: (order[r["method"]], r["seed"]))
    report = args.report or args.out
    report.mkdir(parents=True, exist_ok=True)
    if results:
        study_report.write(results, found, rates, args.baselines, report)
    refuse_failures(results, todo)


if __name__ == "__main__":
    main()
