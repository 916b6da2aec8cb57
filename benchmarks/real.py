"""What does each method do to a language model that others trained? SmolLM2, paired by seed.

    python benchmarks/real.py [--policy DIR] [--methods grpo sc-sdpo-t06 mine.yaml] [--seeds 3]
                              [--jobs 2] [--out DIR] [--report DIR] [--merge FILE] [WORDS]

Every run is `scsdpo fit` with configs/smollm2.yaml, the method's file over it, a variant's words
(benchmarks/variants.py) and these WORDS, as --model.limits.max_tokens=2048; nothing else changed:
the same start, questions, number of steps, learning rate and held-out questions. The seed sets the
order of questions and every draw. DIR is a folder with HuggingFaceTB/SmolLM2-135M-Instruct or any
other policy; without it the hub's.

Runs are those of `scsdpo compare --configs`: what is in --out already is not done again, a stopped
benchmark goes on, seeds and methods can be added, and any two of --out/METHOD can be given to
`scsdpo compare`. A run with a warm-up starts where that ends: its gain is over the validation
there, and its policy is called "warmed up". The name of a source of questions, as
benchmarks/science_words.py makes one, stands after the policy's. Writes real.json (a row a run) and
real.md (the tables of real_report.py) into --report; --merge adds the rows to a file of others.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import real_report
import variants
import yaml
from study import ROOT

from scsdpo.cli.compare import job
from scsdpo.comparison import DONE, Job, run_all

METHODS = ("grpo", "sdpo", "sdpo-drop-degenerate", "sc-sdpo", "srpo", "sdpo-hybrid")
GPU = re.compile(r"RTX \w+|[A-Z]+\d+\w*")
"""What is short in a GPU's name: "NVIDIA A100-SXM4-80GB" is an A100."""


def jobs(args: argparse.Namespace) -> dict[Job, tuple[str, int]]:
    """A run for each seed and method; one seed of all methods before the next."""
    base = [
        f"--config={ROOT / 'configs' / 'smollm2.yaml'}",
        *([f"--model.policy.name_or_path={args.policy}"] if args.policy else []),
        "--checkpoint.save_last=false",
        "--checkpoint.save_top_k=0",
    ]
    # A method file's rate is of its paper's model: all methods run at the base file's.
    model = yaml.safe_load((ROOT / "configs" / "smollm2.yaml").read_text())["model"]
    own = f"--model.optimizer.init_args.lr={model['optimizer']['init_args']['lr']}"
    found = {}
    for seed in range(args.seeds):
        for method in args.methods:
            name = Path(method).stem
            file, *changes = variants.words(method)
            run = job(args.out, name, seed, [*base, file, own, *changes, *args.words])
            found[run] = (name, seed)
    return found


def result(folder: Path, method: str, seed: int, words: Sequence[str] = ()) -> dict:
    """The numbers of a run; of one that was cut off, those that it has.

    Args:
        folder: of the run.
        method: its name.
        seed: its seed.
        words: that were given to every run.
    """
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    val = [row for row in log if "val/mean@8" in row]
    train = [row for row in log if "train/pass_rate" in row]
    done = (folder / DONE).exists()
    seconds = round(json.loads((folder / DONE).read_text())["cpu_seconds"], 1) if done else None
    config = yaml.safe_load((folder / "config.yaml").read_text())
    model, task = config["model"], config["data"]["train"]["init_args"].get("name")
    warmup = model["warmup"]["steps"]
    first = min(warmup, variants.WARM_STEPS)
    start = next((row for row in val if row["batch"] >= first), None)
    policy = Path(model["policy"]["init_args"]["name_or_path"]).name
    start_of = [policy, *([task] if task else []), *(["warmed up"] if warmup else [])]
    found: dict = {
        "method": method,
        "seed": seed,
        "policy": ", ".join(start_of),
        "device": device(json.loads((folder / "environment.json").read_text())["device"]),
        "words": list(words),
        "done": done,
        "batches": len(train),
        "cpu_seconds": seconds,
    }
    for name in real_report.ENDS:
        found[name] = round(val[-1][f"val/{name}"], 4) if done else None
        found[f"{name} before"] = round(start[f"val/{name}"], 4) if start else None
    found["validation"] = {str(row["batch"]): round(row["val/mean@8"], 4) for row in val}
    for name in real_report.TRAINING:
        found[name] = at_both_ends(
            [row[f"train/{name}"] for row in train if f"train/{name}" in row]
        )
    found["warnings"] = warnings(folder)
    return found


def at_both_ends(series: Sequence[float]) -> list[float] | None:
    """Means of the first and the last batches, if there are any."""
    window = real_report.WINDOW
    if not series:
        return None
    return [round(statistics.fmean(part), 4) for part in (series[:window], series[-window:])]


def device(name: str) -> str:
    """`CPU`, or the GPU's short name, of what environment.json says."""
    if name.startswith("cpu"):
        return real_report.CPU
    short = GPU.search(name)
    return short[0] if short else name


def warnings(folder: Path) -> dict[str, int]:
    """Of each health rule that spoke, the batch at which it did first."""
    file = folder / "health.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row["rule"], row["batch"])
    return first


def parsed(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False
    )
    parser.add_argument("--policy", help="folder or name; of configs/smollm2.yaml otherwise")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names, variants or files")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--report", type=Path, help="folder of the tables, if not --out")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="add the rows to this file")
    parser.add_argument("--baselines", nargs="+", default=real_report.BASELINES)
    given, given_words = parser.parse_known_args(args)
    given.words = given_words
    for word in given_words:
        if not re.fullmatch(r"--[\w.+]+=.*", word, re.DOTALL):
            parser.error(f"{word}: a word for every run is written --key=value")
    unknown = [method for method in given.methods if not variants.is_known(method)]
    if unknown:
        parser.error(
            f"--methods: {unknown[0]} is no file, none of configs/methods and none of "
            f"{', '.join(variants.VARIANTS)}"
        )
    names = [Path(method).stem for method in given.methods]
    if len(set(names)) < len(names):
        parser.error(f"--methods: names must differ, got {', '.join(names)}")
    return given


def main() -> None:
    args = parsed()
    args.out = args.out.resolve()
    todo = jobs(args)
    try:
        failed = run_all(list(todo), args.jobs, lambda line: print(line, file=sys.stderr))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    rows = [
        result(run.folder, *cell, args.words) for run, cell in todo.items() if run not in failed
    ]
    if rows:
        report = args.report or args.out
        real_report.write(rows, report / "real.json")
        (report / "real.md").write_text("\n".join(real_report.tables(rows, args.baselines)))
        if args.merge:
            real_report.merge(rows, args.merge)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(todo)} runs failed; run it again")


if __name__ == "__main__":
    main()
