"""Does `scsdpo check` foretell what training does? Its figures beside the gain of a short run.

    python benchmarks/check.py [--smollm2 DIR] [--pairs levels-4 cap-24] [--batches 40] [--out DIR]

A pair is a policy and a task, as words of the command line. Each is checked, then trained by
`scsdpo fit` with the same words; the gain is that of mean@k on held-out questions, drawn with the
same model.val_sampling before and after. Without --smollm2 (a folder with
HuggingFaceTB/SmolLM2-135M-Instruct) only pairs of the shipped tiny policy. What is in --out already
is not done again. Prints a table and writes check.md and check.json into --out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study_report import table

from scsdpo.cli.compare import job
from scsdpo.comparison import execute, run_all

ROOT = Path(__file__).resolve().parents[1]
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
"""Of the tiny policy's pairs. `gold`: the bare answer is shown; `backwards`: what is shown is
called wrong."""
SC_SDPO = f"--config={ROOT / 'configs' / 'methods' / 'sc-sdpo.yaml'}"
ON_SMOLLM2 = {
    "hybrid": (),
    "sc-sdpo": (SC_SDPO,),
    "sc-sdpo-temperature-0.6": (SC_SDPO, "--model.sampling.temperature=0.6"),
    "sc-sdpo-gold": (SC_SDPO, "--model.teacher.init_args.context=GoldSolution"),
    **{
        f"sc-sdpo-{operation}": (
            SC_SDPO,
            *(f"--data.{split}.init_args.operations=[{operation}]" for split in ("train", "val")),
        )
        for operation in ("sum", "product")
    },
}
"""Of SmolLM2's, or another policy's in its place: one warmed up, say. `hybrid`: as configured."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A policy and a task: `base` and `change` are words of the command line, `length` of fit's."""

    base: tuple[str, ...]
    change: tuple[str, ...]
    length: tuple[str, ...]


def pairs(smollm2: Path | None, batches: int) -> dict[str, Pair]:
    """All pairs, by name."""
    cut = (f"--trainer.limit_train_batches={batches}", f"--trainer.val_check_interval={batches}")
    found = {name: Pair(base=TINY, change=change, length=cut) for name, change in CHANGES.items()}
    if smollm2 is None:
        return found
    base = (
        f"--config={ROOT / 'configs' / 'smollm2.yaml'}",
        f"--model.policy.name_or_path={smollm2}",
    )
    for name, change in ON_SMOLLM2.items():
        found[f"{smollm2.name}-{name}"] = Pair(base=base, change=change, length=())
    return found


def look(pair: Pair, folder: Path, questions: int) -> dict:
    """What `scsdpo check` says of a pair."""
    file = folder / "check.json"
    if not file.exists():
        quiet = ("--trainer.logger=false", "--trainer.enable_progress_bar=false")
        given = (f"--questions={questions}", f"--out={file}")
        command = [sys.executable, "-m", "scsdpo", "check", *given, *pair.base, *pair.change]
        execute([*command, *quiet], folder / "check.txt")
    return json.loads(file.read_text())


def gain(folder: Path) -> tuple[float, float]:
    """mean@k before and after a run."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in log if "val/mean@8" in row]
    return rows[0]["val/mean@8"], rows[-1]["val/mean@8"]


def markdown(results: Mapping[str, dict]) -> str:
    """A row a pair, the largest gain first."""
    rows: list[list[object]] = []
    for name, found in sorted(results.items(), key=lambda item: -item[1]["gain"]):
        own, told, way = found["answers"], found.get("told", {}), found["directions"]
        helped = told.get("configured")
        other = told.get("another")
        said = [r["text"].partition(":")[0] for r in found["verdict"] if r["level"] != "good"]
        rows.append(
            [
                name,
                f"{100 * own['pass_rate']['value']:.0f}",
                f"{100 * own['truncated']:.0f}",
                f"{100 * helped['gain']['value']:+.0f}" if helped else "-",
                f"{100 * other['gain']['value']:+.0f}" if other else "-",
                f"{found['preference']:.2f}",
                " ".join(f"{cosine:+.2f}" for cosine in way["step"]) + f" ({way['reward']:+.2f})",
                "; ".join(said) or "ready",
                f"{100 * found['before']:.0f} -> {100 * found['after']:.0f}",
                f"{100 * found['gain']:+.1f}",
            ]
        )
    header = ["pair", "right, %", "cut off, %", "told", "another's", "AUC", "cosine (reward's own)"]
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
    """To standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    args = parsed()
    out = args.out.resolve()
    known = pairs(args.smollm2, args.batches)
    results, failed = {}, 0
    for name in args.pairs or known:
        pair = known[name]
        off = ("--checkpoint.save_last=false", "--checkpoint.save_top_k=0")
        run = job(out, name, 0, [*pair.base, *pair.change, *pair.length, *off])
        try:
            found = look(pair, out / name, args.questions)
        except RuntimeError as error:
            say(f"{name}, check: {error}")
            failed += 1
            continue
        if run_all([run], 1, say):
            failed += 1
            continue
        before, after = gain(run.folder)
        results[name] = {**found, "before": before, "after": after, "gain": after - before}
        (out / "check.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "check.md").write_text(markdown(results))
    print(markdown(results))
    if failed:
        raise SystemExit(f"{failed} pairs failed; run it again")


if __name__ == "__main__":
    main()
