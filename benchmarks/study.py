"""What is each method worth? Same tiny policy, questions and steps; paired by seed.

    python benchmarks/study.py --methods grpo sdpo srpo sc-sdpo --seeds 5 [--out runs/study]
                               [--batches 150] [--lr 1e-4] [--val-size 512] [--jobs 2]

Each (method, seed) is one run of `scsdpo fit` with configs/tiny.yaml, in a process of its own, that
ends after the same number of batches of questions. A run that is in --out already is not run again:
a stopped study goes on, and seeds or methods can be added. Seeds set the order of questions and the
draws; the policy and the held-out questions are the same for all. One learning rate holds for all
methods: for a grid, run the script once a rate, with an --out of its own.

Writes study.json (a row a run, paired differences with 95 % bootstrap intervals), study.md (the
tables) and study.png (curves, their bands over seeds) into --out.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 50
"""Batches of a window of the pass-rate distribution, as in the paper."""
COLUMNS = {
    "mean@16": ("mean@16, %", 100),
    "maj@16": ("maj@16, %", 100),
    "response_length": ("response length", 1),
    "gradient_norm": ("gradient norm", 1),
    "trained_rollouts": ("rollouts trained on", 1),
    "trained_tokens": ("tokens trained on", 1),
    "steps": ("optimizer steps", 1),
    "seconds": ("seconds", 1),
}


def command(method: str, seed: int, folder: Path, args: argparse.Namespace) -> list[str]:
    """One training run."""
    keys = {
        "config": ROOT / "configs" / "tiny.yaml",
        "seed_everything": seed,
        "data.seed": seed,
        "model.sampling.seed": seed,
        "trainer.limit_train_batches": args.batches,
        "trainer.val_check_interval": args.val_every,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": folder,
        "trainer.logger.name": "log",
        "model.optimizer.lr": args.lr,
        "data.val.size": args.val_size,
        "checkpoint.save_last": "false",
    }
    named = [f"--{key}={value}" for key, value in keys.items()]
    overlay = f"--config={ROOT / 'configs' / 'methods' / f'{method}.yaml'}"
    extra = []
    if method == "dapo":
        extra = ["--model.selection.questions=16"]
    if method == "sdpo-paced":
        extra = [f"--model.weighting.path={args.rates}", f"--data.train.size={args.rates_size}"]
    return [sys.executable, "-m", "scsdpo", "fit", named[0], overlay, *named[1:], *extra]


def run(method: str, seed: int, args: argparse.Namespace) -> dict:
    """The result of one run, from its folder if it is there already."""
    folder = args.out / method / f"seed{seed}"
    done = folder / "result.json"
    setting = {"batches": args.batches, "lr": args.lr, "val_size": args.val_size}
    if done.exists():
        result = json.loads(done.read_text())
        if result["setting"] != setting:
            raise SystemExit(f"{done} was made with {result['setting']}: choose another --out")
        return result
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        subprocess.run(
            command(method, seed, folder, args), check=True, stdout=output, stderr=output
        )
    seconds = round(time.perf_counter() - start, 1)
    log = max((folder / "log").glob("version_*/metrics.csv"), key=lambda p: p.stat().st_mtime)
    before = json.loads((log.parent / "before_after.json").read_text())["before"]
    result = {"method": method, "seed": seed, "setting": setting}
    result |= summary(read_log(log), before)
    result["seconds"] = seconds
    done.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("method", "seed", *COLUMNS)}), flush=True)
    return result


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, without empty cells."""
    import csv

    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def summary(log: Sequence[dict[str, float]], before: dict[str, float]) -> dict:
    """Curves over batches, and numbers of the whole run; `before` is not in Lightning's log."""
    train = [row for row in log if "train/pass_rate" in row]
    val = [row for row in log if "val/mean@16" in row]

    def curve(name: str) -> list[float]:
        return [row[f"train/{name}"] for row in train if f"train/{name}" in row]

    informative = curve("medium")
    windows = [informative[i : i + WINDOW] for i in range(0, len(informative), WINDOW)]
    last = {k.removeprefix("val/"): v for k, v in val[-1].items() if k.startswith("val/")}
    norms = curve("gradient_norm")
    return {
        **last,
        "before": before["mean@16"],
        "response_length": statistics.fmean(curve("response_length")[-WINDOW:]),
        "gradient_norm": statistics.fmean(norms) if norms else 0.0,
        "trained_rollouts": sum(curve("trained_rollouts")),
        "trained_tokens": sum(curve("trained_tokens")),
        "steps": len(norms),
        "medium_by_window": [statistics.fmean(window) for window in windows],
        "curves": {
            **{k: [before[k], *(row[f"val/{k}"] for row in val)] for k in ("mean@16", "maj@16")},
            "pass rate": curve("pass_rate"),
            "response length": curve("response_length"),
            "share of questions with p in [1/8, 7/8]": informative,
        },
    }


def bootstrap(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean, resampling seeds; of one value: no interval (nan)."""
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def pairs(results: Sequence[dict], metric: str) -> list[dict]:
    """Second method minus first, seed by seed, on the seeds that both have."""
    by_method: dict[str, dict[int, float]] = {}
    for result in results:
        by_method.setdefault(result["method"], {})[result["seed"]] = result[metric]
    rows = []
    for first, second in combinations(by_method, 2):
        seeds = sorted(by_method[first].keys() & by_method[second].keys())
        differences = [by_method[second][s] - by_method[first][s] for s in seeds]
        low, high = bootstrap(differences)
        mean = statistics.fmean(differences)
        rows.append({"first": first, "second": second, "n": len(seeds), "mean": mean})
        rows[-1] |= {"low": low, "high": high, "tells": low > 0 or high < 0}
    return rows


def markdown(results: Sequence[dict], differences: Sequence[dict]) -> str:
    """The two tables, means over seeds."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    levels = sorted({k for r in results for k in r if k.endswith("/mean@16")})
    names = {**{k: v[0] for k, v in COLUMNS.items()}, **{k: f"{k}, %" for k in levels}}
    lines = ["| method | seeds | " + " | ".join(names.values()) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for method in methods:
        own = [r for r in results if r["method"] == method]
        cells = []
        for name in names:
            scale = COLUMNS[name][1] if name in COLUMNS else 100
            cells.append(f"{scale * statistics.fmean(r[name] for r in own):.4g}")
        lines.append(f"| {method} | {len(own)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| mean@16, points | n | difference | 95 % interval | told apart |",
        "|---" * 5 + "|",
    ]
    for row in differences:
        mean, low, high = (100 * row[k] for k in ("mean", "low", "high"))
        told = "yes" if row["tells"] else "no"
        name = f"{row['second']} - {row['first']}"
        lines.append(f"| {name} | {row['n']} | {mean:+.1f} | {low:+.1f} .. {high:+.1f} | {told} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[dict], path: Path) -> None:
    """Means over seeds, with 95 % bootstrap bands."""
    from matplotlib.figure import Figure

    titles = list(results[0]["curves"])
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    for ax, title in zip(figure.subplots(1, len(titles)), titles, strict=True):
        for method in dict.fromkeys(result["method"] for result in results):
            curves = [r["curves"][title] for r in results if r["method"] == method]
            points = list(zip(*(smooth(c) if len(c) > 60 else c for c in curves), strict=False))
            middle = [statistics.fmean(point) for point in points]
            (line,) = ax.plot(middle, label=method)
            if len(curves) > 1:
                low, high = zip(*(bootstrap(point, 500) for point in points), strict=True)
                ax.fill_between(range(len(points)), low, high, alpha=0.2, color=line.get_color())
        unit = "validation" if title.endswith("@16") else "batch"
        ax.set(title=title, xlabel=unit)
        ax.legend()
    figure.savefig(path, dpi=120)


def smooth(values: Sequence[float], width: int = 10) -> list[float]:
    """Mean over the last `width` values."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def parsed(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--val-every", type=int, default=25, help="batches between validations")
    parser.add_argument("--val-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--rates", default="rates.json", help="of `scsdpo rates`, for sdpo-paced")
    parser.add_argument("--rates-size", type=int, default=2400, help="training questions in it")
    given = parser.parse_args(args)
    known = sorted(p.stem for p in (ROOT / "configs" / "methods").glob("*.yaml"))
    unknown = set(given.methods) - set(known)
    if unknown:
        parser.error(f"--methods: {sorted(unknown)[0]} is none of {', '.join(known)}")
    return given


def report(results: Sequence[dict], out: Path, draw: Callable[..., None] = plot) -> None:
    """Write the three files."""
    differences = pairs(results, "mean@16")
    rows = [{k: v for k, v in r.items() if k != "curves"} for r in results]
    (out / "study.json").write_text(
        json.dumps({"runs": rows, "differences": differences}, indent=1) + "\n"
    )
    (out / "study.md").write_text(markdown(results, differences))
    draw(results, out / "study.png")
    print((out / "study.md").read_text())


def main() -> None:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda one: run(*one, args), todo))
    order = {method: i for i, method in enumerate(args.methods)}
    report(sorted(results, key=lambda r: (order[r["method"]], r["seed"])), args.out)


if __name__ == "__main__":
    main()
