"""Does `scsdpo check` foretell what training does? Its figures beside the gain of a short run.

    python benchmarks/check.py [--smollm2 DIR] [--pairs levels-4 cap-24] [--batches 40] [--out DIR]

A pair is a policy and a task, as words of the command line. Each is checked, then trained by
`scsdpo fit` with the same words; the gain is that of mean@k on held-out questions, drawn with the
same model.val_sampling before and after. Without --smollm2 (a folder with
HuggingFaceTB/SmolLM2-135M-Instruct) only pairs of the shipped tiny policy. What is in --out already
is not done again, and pairs can be added. Prints a table and writes check.md and check.json, a pair
a line, into --out.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import variants
from study import ROOT
from study_report import table, write_rows

from scsdpo.cli.compare import job
from scsdpo.comparison import execute

TINY = (
    f"--config={ROOT / 'configs' / 'tiny.yaml'}",
    "--data.val.init_args.size=96",
    "--data.val_questions_per_batch=96",
    "--model.val_sampling.n=8",
    "--model.val_sampling.seed=0",
)
GRPO = f"--config={ROOT / 'configs' / 'methods' / 'grpo.yaml'}"
TEMPLATES = "--model.teacher.init_args.context.init_args.templates"
CALLED_WRONG = "\nA wrong solution, not to be followed\n\n{demonstration}\n\n"
CHANGES: dict[str, tuple[str, ...]] = {
    "as-shipped": (),
    "level-1": ("--data.train.init_args.levels=[1]", "--data.val.init_args.levels=[1]"),
    "levels-4": ("--data.train.init_args.levels=[4]", "--data.val.init_args.levels=[4]"),
    "science": ("--data.train.init_args.shapes=[science]", "--data.val.init_args.shapes=[science]"),
    "cap-24": ("--model.sampling.max_new_tokens=24",),
    "temperature-2": ("--model.sampling.temperature=2",),
    "temperature-2-grpo": (GRPO, "--model.sampling.temperature=2"),
    "gold": ("--model.teacher.init_args.context=GoldSolution",),
    "backwards": (f"{TEMPLATES}.solution={CALLED_WRONG}",),
    "rate-1e-3": ("--model.optimizer.init_args.lr=1e-3",),
}
"""Teachers of the tiny policy's pairs. `gold` shows the bare answer; `backwards` calls the
shown solution wrong."""
KEPT_BACK: dict[str, tuple[str, ...]] = {
    "sdpo": variants.words("sdpo"),
    "srpo": variants.words("srpo"),
    "rate-3e-3": (variants.rate("3e-3"),),
    "rate-1e-5": (variants.rate("1e-5"),),
    "grpo-rate-1e-3": (GRPO, variants.rate("1e-3")),
    "cap-12": ("--model.sampling.max_new_tokens=12",),
    "temperature-0.6": ("--model.sampling.temperature=0.6",),
    "tool": ("--data.train.init_args.shapes=[tool]", "--data.val.init_args.shapes=[tool]"),
    "two-responses": ("--model.sampling.n=2",),
    "feedback": ("--model.teacher.init_args.context=Feedback",),
    "store": (),
}
"""Pairs of the tiny policies that no rule of `scsdpo check` was fitted on."""
STORE = (
    f"--config={ROOT / 'configs' / 'tiny-tools.yaml'}",
    "--model.val_sampling.n=8",
    "--model.val_sampling.seed=0",
)
"""The policy of several turns, of the pair `store`."""
ON_SMOLLM2 = {
    **{name: variants.words(name) for name in ("sdpo-hybrid", "sc-sdpo", "sc-sdpo-t06")},
    "sc-sdpo-gold": variants.words("sc-sdpo-gold"),
    **{
        f"sc-sdpo-{operation}": (
            *variants.words("sc-sdpo"),
            *(f"--data.{split}.init_args.operations=[{operation}]" for split in ("train", "val")),
        )
        for operation in ("sum", "product")
    },
}
"""Pairs of SmolLM2, or of another policy in its place, such as a warmed-up one."""
FILE = "check.json"
TOLD = ("configured", "another")
"""Contexts of the teacher in the columns of the table."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A policy and a task: `base` and `change` are words of the command line, `length` of fit's."""

    base: tuple[str, ...]
    change: tuple[str, ...]
    length: tuple[str, ...]


def pairs(smollm2: Path | None, batches: int) -> dict[str, Pair]:
    """All pairs, by name."""
    cut = (f"--trainer.limit_train_batches={batches}", f"--trainer.val_check_interval={batches}")
    changes = CHANGES | KEPT_BACK
    found = {name: Pair(base=TINY, change=change, length=cut) for name, change in changes.items()}
    found["store"] = Pair(base=STORE, change=(), length=cut)
    if smollm2 is None:
        return found
    base = (
        f"--config={ROOT / 'configs' / 'smollm2.yaml'}",
        f"--model.policy.name_or_path={smollm2}",
    )
    for name, change in ON_SMOLLM2.items():
        found[f"{smollm2.name}-{name}"] = Pair(base=base, change=change, length=())
    return found


def asked(pair: Pair, questions: int) -> list[str]:
    """The words of a pair's `scsdpo check`."""
    quiet = ("--trainer.logger=false", "--trainer.enable_progress_bar=false")
    return [f"--questions={questions}", *pair.base, *pair.change, *quiet]


def look(words: Sequence[str], folder: Path) -> dict:
    """The record of `scsdpo check` for a pair.

    Raises:
        ValueError: if the folder has what it said of other words.
    """
    file, command = folder / FILE, folder / "command.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command.write_text(json.dumps(list(words), indent=1) + "\n")
        line = [sys.executable, "-m", "scsdpo", "check", f"--out={file}", *words]
        execute(line, folder / "check.txt")
    before = json.loads(command.read_text()) if command.exists() else []
    if odd := [*(w for w in words if w not in before), *(w for w in before if w not in words)]:
        raise ValueError(f"{file} is of another command ({odd[0]}): choose another --out")
    return json.loads(file.read_text())


def gain(folder: Path) -> tuple[float, float]:
    """mean@k before and after a run."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in log if "val/mean@8" in row]
    return rows[0]["val/mean@8"], rows[-1]["val/mean@8"]


def row(name: str, found: Mapping, words: Sequence[str], ends: tuple[float, float]) -> dict:
    """A pair's line of check.json; without the folders of this machine."""
    policy = Path(found["policy"])
    command = [word.replace(f"{ROOT}/", "").replace(str(policy), policy.name) for word in words]
    before, after = ends
    ends_of_run = {"before": before, "after": after, "gain": after - before}
    asked_as = shlex.join(["scsdpo", "check", *command])
    return {"pair": name, "command": asked_as, **ends_of_run, **found, "policy": policy.name}


def read(file: Path) -> dict[str, dict]:
    """The rows of a check.json, by pair; none if there is no file."""
    rows = json.loads(file.read_text()) if file.exists() else []
    if not isinstance(rows, list):
        raise ValueError(f"{file} was written by an older version: choose another --out")
    return {one["pair"]: one for one in rows}


def write(rows: Mapping[str, dict], file: Path) -> None:
    """A pair a line, sorted."""
    write_rows((rows[name] for name in sorted(rows)), file)


def said(value: float | None, form: str, scale: float = 1) -> str:
    """A figure, or - if it is not known."""
    return "-" if value is None else format(scale * value, form)


def between(cosine: Mapping[str, float | None]) -> str:
    """A cosine and its interval."""
    value, low, high = (said(cosine[key], "+.2f") for key in ("value", "low", "high"))
    return value if low == "-" else f"{value} ({low} .. {high})"


def verdict(remarks: Sequence[Mapping[str, str]]) -> str:
    """Name the remarks in a few words, the worst first."""
    told = [
        f"{level}: {'; '.join(texts)}"
        for level in ("stop", "warning")
        if (texts := [r["text"].partition(":")[0] for r in remarks if r["level"] == level])
    ]
    return ". ".join(told) or "ready"


def markdown(results: Mapping[str, dict]) -> str:
    """A row a pair, the largest gain first."""
    rows: list[list[object]] = []
    for name, found in sorted(results.items(), key=lambda item: -item[1]["gain"]):
        own, told, way = found["answers"], found["told"], found["directions"]
        helps = [told[key]["gain"]["value"] if key in told else None for key in TOLD]
        rows.append(
            [
                name,
                said(own["pass_rate"]["value"], ".0f", 100),
                said(own["truncated"], ".0f", 100),
                *(said(help, "+.0f", 100) for help in helps),
                said(found["preference"], ".2f"),
                between(way["step"]) if way else "-",
                said(way["reward"], "+.2f") if way else "-",
                verdict(found["verdict"]),
                f"{100 * found['before']:.0f} -> {100 * found['after']:.0f}",
                f"{100 * found['gain']:+.1f}",
            ]
        )
    header = ["pair", "right, %", "cut off, %", "told", "another's", "AUC"]
    header += ["first step, cosine (95 %)", "reward's own"]
    return table([*header, "verdict", "held-out mean@8, %", "gain"], rows)


def parsed(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", nargs="+", help="names; all otherwise")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="the policy of more pairs")
    parser.add_argument("--batches", type=int, default=40, help="of the tiny policy's runs")
    parser.add_argument("--questions", type=int, default=32, help="of each check")
    parser.add_argument("--out", type=Path, default=Path("runs/check"))
    given = parser.parse_args(args)
    known = pairs(given.smollm2, given.batches)
    for name in given.pairs or ():
        if name not in known:
            parser.error(f"--pairs: {name} is none of {', '.join(known)}")
    return given


def say(line: str) -> None:
    """Print to standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def measured(name: str, pair: Pair, out: Path, questions: int) -> dict:
    """A pair's row, of what is in --out or done now.

    Raises:
        ValueError: if what is there is of another command.
        RuntimeError: if the check or the run fails.
    """
    off = ("--checkpoint.save_last=false", "--checkpoint.save_top_k=0")
    run = job(out, name, 0, [*pair.base, *pair.change, *pair.length, *off])
    done = run.is_done()
    words = asked(pair, questions)
    found = look(words, out / name)
    if not done:
        run.run(os.cpu_count() or 1)
    return row(name, found, words, gain(run.folder))


def main() -> None:
    args = parsed()
    out = args.out.resolve()
    known = pairs(args.smollm2, args.batches)
    failed = 0
    try:
        results = read(out / FILE)
        for name in args.pairs or known:
            try:
                results[name] = measured(name, known[name], out, args.questions)
            except RuntimeError as error:
                say(f"{name}: {error}")
                failed += 1
                continue
            say(f"{name}: done")
            write(results, out / FILE)
            (out / "check.md").write_text(markdown(results))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(markdown(results))
    if failed:
        raise SystemExit(f"{failed} pairs failed; run it again")


if __name__ == "__main__":
    main()
