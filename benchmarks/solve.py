"""One hard question: discovery@k of `scsdpo solve` against sampling and against several turns.

    python benchmarks/solve.py --out docs/real/solve.json

The questions are the lab's at level 4, whose answers are numbers of up to three digits or calls
with several numbers. Of the candidates those are taken, in their order, that the shipped policy
solves in fewer than 1 of 200 of `--probe` attempts. All three arms then have `--attempts` attempts
each, drawn at the same temperature, `--group` at a time:

* `solve`: an optimizer step after each group without a right attempt (methods/sdpo-solve.yaml).
* `frozen`: the policy as it is; best of k.
* `turns`: the policy as it is; each of the group's chains reads the feedback on its own last
  attempt, in the teacher's words, before its next one.

discovery@k is the share of (question, seed) pairs with a right attempt among the first k. Intervals
at 95 % are over questions; those of differences are paired by question. A JSON line a question goes
to standard output as it comes.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import lightning as L

import scsdpo
from scsdpo.cli.solve import solve
from scsdpo.data.rendered import rendered
from scsdpo.lab import LabTasks
from scsdpo.statistics import score_difference, score_interval
from scsdpo.teacher import contexts_of

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "methods" / "sdpo-solve.yaml")


def loaded(args, seed):
    """Module and data of the shipped policy, with its words of feedback."""
    options = (
        f"--model.optimizer.init_args.lr={args.lr}",
        f"--model.sampling.n={args.group}",
        f"--seed_everything={seed}",
        f"--model.teacher.init_args.rate={args.rate}",
        *args.option,
    )
    return scsdpo.load(*FILES, options=options)


def hard_questions(model, source, args):
    """Prompts that are right in fewer than 1 of 200 of `args.probe` attempts, and how often.

    Yields as many as are asked for. A candidate with so many right attempts is dropped at once.
    """
    most, chunk, found = args.probe // 200, 50, 0
    for start in range(0, args.candidates, 16):
        indices = range(start, min(start + 16, args.candidates))
        left = {rendered(source[index], model.policy.chat): 0 for index in indices}
        for number in range(args.probe // chunk):
            sampling = replace(model.sampling.at(number), n=chunk)
            judged = model.judge(model.sample([*left], sampling))
            right = judged.successes.sum(-1).tolist()
            counts = {p: left[p] + r for p, r in zip(left, right, strict=True)}
            left = {prompt: count for prompt, count in counts.items() if count < most}
            if not left:
                break
        for prompt, count in left.items():
            yield prompt, count
            found += 1
            if found == args.questions:
                return


def first_success(successes, before):
    """The number of the first right attempt, from 1; None without one."""
    for number, right in enumerate(successes, start=before + 1):
        if right:
            return number
    return None


def frozen(model, prompt, args):
    """Best of k: sampling without an update."""
    for batch in range(args.attempts // args.group):
        judged = model.judge(model.sample([prompt], model.sampling.at(1 + batch)))
        found = first_success(judged.successes[0].tolist(), batch * args.group)
        if found:
            return found
    return None


def turns(model, prompt, args):
    """Chains of attempts, each of which reads what was wrong with the one before."""
    asked = [replace(prompt, key=f"{prompt.key}/{g}") for g in range(args.group)]
    for batch in range(args.attempts // args.group):
        sampling = replace(model.sampling.at(1 + batch), n=1)
        judged = model.judge(model.sample(asked, sampling))
        found = first_success(judged.successes[:, 0].tolist(), batch * args.group)
        if found:
            return found
        table = contexts_of(model.teacher, model.reference, model.policy.chat, judged)["teacher"]
        asked = [
            replace(one, ids=ids or one.ids) for one, (ids,) in zip(asked, table.ids, strict=True)
        ]
    return None


def solving(prompt, args, seed):
    """`scsdpo solve` from the shipped policy."""
    model, data = loaded(args, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        bare = replace(prompt, ids=())
        found = solve(trainer, model, data, bare, attempts=args.attempts, out=Path(folder, "out"))
    return found.attempts if found.solved else None


def shares(rows, arm, k):
    """By question, the share of seeds with a right attempt among the first k."""
    by_key = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row[arm] is not None and row[arm] <= k)
    return [sum(found) / len(found) for found in by_key.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--questions", type=int, default=20)
    add("--candidates", type=int, default=2000)
    add("--probe", type=int, default=600)
    add("--attempts", type=int, default=512)
    add("--group", type=int, default=16)
    add("--seeds", type=int, default=1)
    add("--lr", type=float, default=1e-4)
    add("--rate", type=float, default=0.01, help="of the teacher's moving average")
    add("--option", action="append", default=[], help="of `scsdpo fit`, for the arm that learns")
    args = parser.parse_args()
    begin = time.time()
    model, _ = loaded(args, 0)
    source = LabTasks("val", seed=7, levels=(4,))
    hard = list(hard_questions(model, source, args))
    print(json.dumps({"hard": len(hard), "seconds": round(time.time() - begin)}), flush=True)
    rows = []
    for prompt, right in hard:
        for seed in range(args.seeds):
            model, _ = loaded(args, seed)
            row = {"key": prompt.key, "probe": right, "seed": seed}
            row["frozen"] = frozen(model, prompt, args)
            row["turns"] = turns(model, prompt, args)
            row["solve"] = solving(prompt, args, seed)
            rows.append(row)
            print(json.dumps(row), flush=True)
    curves = {}
    ks = [k for k in (16, 32, 64, 128, 256, 512, 1024, 2048) if k <= args.attempts]
    for arm in ("solve", "frozen", "turns"):
        curves[arm] = []
        for k in ks:
            found = score_interval(shares(rows, arm, k))
            curves[arm].append([k, found.value, found.low, found.high])
    gains = {}
    for arm in ("frozen", "turns"):
        ours, others = (shares(rows, each, args.attempts) for each in ("solve", arm))
        gain = score_difference(others, ours)
        gains[f"solve - {arm}"] = [gain.value, gain.low, gain.high]
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    record = {"settings": settings, "rows": rows, "discovery": curves, "gain": gains}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for arm, curve in curves.items():
        cells = (f"@{k} {v:.0%} ({low:.0%} .. {high:.0%})" for k, v, low, high in curve)
        print(f"{arm:8}", "  ".join(cells))
    for name, (value, low, high) in gains.items():
        print(f"{name}: {100 * value:+.0f} points ({100 * low:+.0f} .. {100 * high:+.0f})")


if __name__ == "__main__":
    main()
