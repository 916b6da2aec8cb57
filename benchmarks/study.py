"""What is each method worth? Same policy, questions and steps; paired by seed.

    python benchmarks/study.py [--methods grpo sdpo srpo sc-sdpo] [--seeds 5] [--batches 150]
                               [--lrs 1e-5 3e-5 1e-4 3e-4] [--grid-seeds 1] [--jobs 2] [--out DIR]

1. The start: the policy that ships with the package, warmed up further so that it has mastered
   some of the lab's questions, wavers on some and finds some out of reach (`scsdpo.lab.pretrain`).
2. `scsdpo rates` on the training questions: its pass rates before training; PACED needs them.
3. A grid of learning rates, the same for every method: short runs with seeds and held-out
   questions of their own. Each method takes the rate with the best mean. One rate: no grid.
4. The runs: (method, seed) is one `scsdpo fit` with configs/tiny.yaml, in a process of its own,
   over the same training questions, each once. The seed sets their order and every draw.

Whatever is in --out already is not done again: a stopped study goes on, and seeds, methods or rates
can be added. Writes study.json (a row a run, all paired differences), study.md (the tables) and
plots into --report. Needs matplotlib: pip install 'scsdpo[report]'.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import study_report

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
"""What the paper compares, and the control that it lacks."""
START = ("--start", "tiny", "--steps", "300", "--lr", "1.5e-3", "--avoided", ".5", "--fatal", ".12")
WINDOW = 50
"""Batches of a window of the pass-rate distribution, as in the paper."""
QUESTIONS = 16
"""Of a batch."""
GRID_SEED = 1000
"""Seeds of the grid: this one and the next."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What two runs must have in common to be compared."""

    batches: int
    questions_per_batch: int
    lr: float
    val_size: int
    val_every: int
    val_seed: int


def lab(command: str, *options: object) -> list[str]:
    """A `scsdpo` command line on the lab's configuration."""
    config = f"--config={ROOT / 'configs' / 'tiny.yaml'}"
    return [sys.executable, "-m", "scsdpo", command, config, *map(str, options)]


def execute(words: Sequence[str], output: Path) -> float:
    """Run a command on one thread; returns its seconds of CPU, whatever else the machine does.

    Raises:
        RuntimeError: if it fails; names the file that its output went to.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with output.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=env)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}, see {output}")
    return used.ru_utime + used.ru_stime


def start_policy(out: Path) -> Path:
    """Step 1: the folder of the policy that every run starts from."""
    folder = out / "start"
    if not (folder / "record.json").exists():
        words = [sys.executable, "-m", "scsdpo.lab.pretrain", "--out", str(folder), *START]
        execute(words, out / "start.txt")
    return folder


def start_rates(out: Path, start: Path, questions: int) -> list[float]:
    """Step 2: the pass rates of the training questions before training; their file is in `out`."""
    file = out / "rates.json"
    if not file.exists():
        options = (
            f"--out={file}",
            f"--data.train.size={questions}",
            f"--model.policy.name_or_path={start}",
        )
        execute(lab("rates", *options), out / "rates.txt")
    rates = [right / of for right, of in json.loads(file.read_text())["rates"].values()]
    if len(rates) != questions:
        raise SystemExit(
            f"{file} has {len(rates)} questions, not {questions}: choose another --out"
        )
    return rates


def command(method: str, seed: int, setting: Setting, folder: Path, out: Path) -> list[str]:
    """One training run: every training question once, in an order of its own."""
    overlay = ROOT / "configs" / "methods" / f"{method}.yaml"
    keys = {
        "seed_everything": seed,
        "data.seed": seed,
        "data.train.size": setting.batches * setting.questions_per_batch,
        "data.questions_per_batch": setting.questions_per_batch,
        "data.val.seed": setting.val_seed,
        "data.val.size": setting.val_size,
        "model.sampling.seed": seed,
        "model.policy.name_or_path": out / "start",
        "model.optimizer.lr": setting.lr,
        "trainer.limit_train_batches": setting.batches,
        "trainer.val_check_interval": setting.val_every,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": folder,
        "trainer.logger.name": "log",
        "checkpoint.save_last": "false",
    }
    if method == "dapo":
        keys["model.selection.questions"] = setting.questions_per_batch
    if method == "sdpo-paced":
        keys["model.weighting.path"] = out / "rates.json"
    options = [f"--{key}={value}" for key, value in keys.items()]
    return lab("fit", f"--config={overlay}", *options)


def run(method: str, seed: int, *, setting: Setting, folder: Path, out: Path) -> dict | None:
    """The result of one run, from its folder if it is there already; None if the run failed."""
    done = folder / "result.json"
    if done.exists():
        result = json.loads(done.read_text())
        if result["setting"] != asdict(setting):
            raise SystemExit(f"{done} was made with {result['setting']}: choose another --out")
        return result
    try:
        words = command(method, seed, setting, folder, out)
        seconds = execute(words, folder / "output.txt")
    except RuntimeError as error:
        print(f"{method}, seed {seed}: {error}", file=sys.stderr, flush=True)
        return None
    log = max((folder / "log").glob("version_*/metrics.csv"), key=lambda p: p.stat().st_mtime)
    before = json.loads((log.parent / "before_after.json").read_text())["before"]
    result = {"method": method, "seed": seed, "setting": asdict(setting), "cpu_seconds": seconds}
    result |= summary(read_log(log), before, setting.val_every)
    written = done.with_suffix(".new")
    written.write_text(json.dumps(result, indent=1) + "\n")
    written.replace(done)
    print(f"{method} seed {seed} lr {setting.lr}: {100 * result['mean@16']:.1f}", flush=True)
    return result


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, without empty cells."""
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def summary(log: Sequence[dict[str, float]], before: dict[str, float], val_every: int) -> dict:
    """Numbers of the whole run, and curves; `before` is not in Lightning's log."""
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
        "before": before["mean@16"],
        "response_length": statistics.fmean(lengths[-WINDOW:]),
        "gradient_norm": statistics.fmean(norms) if norms else 0.0,
        "trained_rollouts": sum(series("trained_rollouts")),
        "trained_tokens": sum(series("trained_tokens")),
        "steps": len(norms),
        "windows": {name: windows(name) for name in shares},
        "validated_at": [val_every * i for i in range(len(val) + 1)],
        "validation": {name: [before[name], *(row[f"val/{name}"] for row in val)] for name in last},
        "training": {
            "pass_rate": series("pass_rate"),
            "response_length": lengths,
            "gradient_norm": norms,
            "trained_rollouts": series("trained_rollouts"),
            **{name: series(name) for name in shares},
        },
    }


def in_parallel(todo: Iterable[partial], processes: int) -> list[dict]:
    """The results of the runs that did not fail."""
    with ThreadPoolExecutor(processes) as pool:
        return [result for result in pool.map(lambda job: job(), todo) if result is not None]


def jobs(
    args: argparse.Namespace,
    folder: Path,
    cells: Sequence[tuple[str, float]],
    seeds: range,
    **rest: int,
) -> list[partial]:
    """A run for each seed and (method, rate); `rest` is of the `Setting`."""
    found = []
    for seed in seeds:
        for method, lr in cells:
            setting = Setting(lr=lr, questions_per_batch=QUESTIONS, **rest)
            into = folder / f"{lr:g}" / method / f"seed{seed}"
            found.append(partial(run, method, seed, setting=setting, folder=into, out=args.out))
    return found


def grid(args: argparse.Namespace) -> dict[tuple[str, float], list[float]]:
    """Step 3: final mean@16 of every method at every rate, a value a grid seed."""
    todo = jobs(
        args,
        args.out / "grid",
        [(method, lr) for method in args.methods for lr in args.lrs],
        range(GRID_SEED, GRID_SEED + args.grid_seeds),
        batches=args.grid_batches,
        val_size=256,
        val_every=args.grid_batches,
        val_seed=1,
    )
    results = in_parallel(todo, args.jobs)
    refuse_failures(results, todo)
    found: dict[tuple[str, float], list[float]] = {}
    for result in results:
        key = (result["method"], result["setting"]["lr"])
        found.setdefault(key, []).append(result["mean@16"])
    return found


def refuse_failures(results: Sequence[dict], todo: Sequence[partial]) -> None:
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
    parser.add_argument("--methods", nargs="+", default=METHODS, help="files of configs/methods")
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
    unknown = set(given.methods) - set(known)
    if unknown:
        parser.error(f"--methods: {sorted(unknown)[0]} is none of {', '.join(known)}")
    if given.grid_batches > given.batches:
        parser.error("--grid-batches must not exceed --batches: PACED knows their questions only")
    if given.batches % given.val_every:
        parser.error("--batches must be a multiple of --val-every: the last validation is the end")
    return given


def main() -> None:
    args = parsed()
    args.out = args.out.resolve()
    start = start_policy(args.out)
    rates = start_rates(args.out, start, QUESTIONS * args.batches)
    found = grid(args) if len(args.lrs) > 1 else {}
    best = chosen(found) if found else dict.fromkeys(args.methods, args.lrs[0])
    todo = jobs(
        args,
        args.out / "runs",
        [(method, best[method]) for method in args.methods],
        range(args.seeds),
        batches=args.batches,
        val_size=args.val_size,
        val_every=args.val_every,
        val_seed=0,
    )
    results = in_parallel(todo, args.jobs)
    order = {method: i for i, method in enumerate(args.methods)}
    results.sort(key=lambda r: (order[r["method"]], r["seed"]))
    report = args.report or args.out
    report.mkdir(parents=True, exist_ok=True)
    if results:
        study_report.write(results, found, rates, args.baselines, report)
    refuse_failures(results, todo)


if __name__ == "__main__":
    main()
