"""One hard question: discovery@k of `scsdpo solve` against sampling and against several turns.

    python benchmarks/solve.py --out docs/real/solve.json

The questions are the lab's science questions of level 4, with the whole working judged: each of the
four results must be right, and the answer too (benchmarks/working.py). A number could be guessed in
some hundreds of attempts, four that depend on each other cannot. The feedback names the first step
that is wrong, as it was written. Of the candidates those are taken, in their order, that the
shipped policy solves in
fewer than 1 of 200 of `--probe` attempts. All arms then have `--attempts` attempts each, drawn at
the same temperature, `--group` at a time, and none of them is an attempt of the probe:

* `solve`: an optimizer step after each group without a right attempt (methods/sdpo-solve.yaml).
* `frozen`: the policy as it is; best of k.
* `turns`: the policy as it is; each of the group's chains reads the feedback on its own last
  attempt, in the teacher's words, before its next one.
* `dialogue`: as `turns`, but a chain reads its own last `--remembered` attempts too, as turns of a
  conversation, each with its feedback.

A first group is the same one in `solve` and in `frozen`. discovery@k is the share of (question,
seed) pairs with a right attempt among the first k. Intervals at 95 % are over questions, whose
score is the share of their seeds; those of differences are paired by question. What is found is
kept in a file beside `--out`, line by line, and a run with the same settings goes on from it.
"""

import argparse
import json
import operator
import tempfile
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path

import lightning as L

import scsdpo
from scsdpo.cli.solve import solve
from scsdpo.data.rendered import rendered
from scsdpo.lab import LabTasks
from scsdpo.report.attempts import discovery_panel
from scsdpo.report.paper import save
from scsdpo.statistics import score_difference, score_interval
from scsdpo.teacher import contexts_of
from scsdpo.types import stable_hash
from scsdpo.verifiers import Callable

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "methods" / "sdpo-solve.yaml")
PROBE = stable_hash("benchmarks/solve.py", "probe") % 2**31
"""Seed of the probe: its attempts are none of the arms', or best of k would repeat its misses."""
OPERATIONS = {"*": operator.mul, "+": operator.add, "-": operator.sub}
RETRY = "\n\nCorrectly solve the original question.\n"


class Workings(LabTasks):
    """Science questions of level 4 whose working is judged."""

    def __init__(self, seed):
        super().__init__("val", seed=seed, levels=(4,), shapes=("science",))

    def __getitem__(self, index):
        question = self.question(index)
        results = list(
            accumulate(
                question.steps,
                lambda value, step: OPERATIONS[step[0]](value, step[1]),
                initial=question.first,
            )
        )
        return replace(
            super().__getitem__(index),
            answer=" ".join(map(str, results[1:])),
            verifier=Callable(function="working:judged", strip_thinking=False),
        )


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
    """Places of questions that are right in fewer than 1 of 200 attempts, and how often they were.

    A candidate with so many right attempts is dropped at once.
    """
    most, chunk = -(-args.probe // 200), 50
    for start in range(0, args.candidates, 16):
        indices = range(start, min(start + 16, args.candidates))
        places = {rendered(source[index], model.policy.chat): index for index in indices}
        left = dict.fromkeys(places, 0)
        for number in range(args.probe // chunk):
            sampling = replace(model.sampling, seed=PROBE, n=chunk).at(number)
            judged = model.judge(model.sample([*left], sampling))
            right = judged.successes.sum(-1).tolist()
            counts = {p: left[p] + r for p, r in zip(left, right, strict=True)}
            left = {prompt: count for prompt, count in counts.items() if count < most}
            if not left:
                break
        for prompt, count in left.items():
            yield {"question": places[prompt], "key": prompt.key, "probe": count}


def first_success(successes, before):
    """The number of the first right attempt, from 1; None without one."""
    for number, right in enumerate(successes, start=before + 1):
        if right:
            return number
    return None


def frozen(model, prompt, args, seed):
    """Best of k: sampling without an update."""
    asked, sampling = rendered(prompt, model.policy.chat), replace(model.sampling, seed=seed)
    for batch in range(args.attempts // args.group):
        judged = model.judge(model.sample([asked], sampling.at(1 + batch)))
        found = first_success(judged.successes[0].tolist(), batch * args.group)
        if found:
            return found
    return None


def chains(model, prompt, args, seed, told):
    """Chains of attempts; `told(judged, asked)` is what each is asked next."""
    first, sampling = rendered(prompt, model.policy.chat), replace(model.sampling, seed=seed, n=1)
    asked = [replace(first, key=f"{prompt.key}/{g}") for g in range(args.group)]
    for batch in range(args.attempts // args.group):
        judged = model.judge(model.sample(asked, sampling.at(1 + batch)))
        found = first_success(judged.successes[:, 0].tolist(), batch * args.group)
        if found:
            return found
        asked = told(judged, asked)
    return None


def turns(model, prompt, args, seed):
    """The next attempt reads what was wrong with the last one, as the teacher of `solve` does."""

    def told(judged, asked):
        table = contexts_of(model.teacher, model.reference, model.policy.chat, judged)["teacher"]
        return [
            replace(one, ids=ids or one.ids) for one, (ids,) in zip(asked, table.ids, strict=True)
        ]

    return chains(model, prompt, args, seed, told)


def dialogue(model, prompt, args, seed):
    """The next attempt reads the chain's last attempts, each with what was wrong with it."""

    def told(judged, asked):
        questions = []
        for one, (text,), (verdict,) in zip(asked, judged.texts, judged.verdicts, strict=True):
            said = (
                {"role": "assistant", "content": text},
                {"role": "user", "content": verdict.feedback + RETRY},
            )
            before = one.messages[len(prompt.messages) :]
            kept = (*before, *said)[-2 * args.remembered :]
            messages = (*prompt.messages, *kept)
            questions.append(rendered(replace(one, messages=messages, ids=()), model.policy.chat))
        return questions

    return chains(model, prompt, args, seed, told)


def solving(model, prompt, args, seed):
    """`scsdpo solve` from the shipped policy, which is loaded anew; `model` stays as it is."""
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
        out = Path(folder, "out")
        found = solve(trainer, model, data, prompt, attempts=args.attempts, out=out)
    return found.attempts if found.solved else None


LABELS = {
    "solve": "scsdpo solve",
    "frozen": "frozen, best of k",
    "turns": "frozen, feedback",
    "dialogue": "frozen, dialogue",
}
ARMS = {"solve": solving, "frozen": frozen, "turns": turns, "dialogue": dialogue}


def shares(rows, arm, k):
    """Share of seeds with a right attempt among the first k, by question."""
    by_key = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row[arm] is not None and row[arm] <= k)
    return [sum(found) / len(found) for found in by_key.values()]


def discovered(rows, arm, ks):
    """The curve of an arm's discovery@k, with intervals over questions."""
    found = [(k, score_interval(shares(rows, arm, k))) for k in ks]
    return [[k, each.value, each.low, each.high] for k, each in found]


def figures(rows, args):
    """Curves of discovery@k by arm, and differences at powers of two, with their intervals."""
    ks = range(args.group, args.attempts + 1, args.group)
    curves = {arm: discovered(rows, arm, ks) for arm in args.arms}
    gains = {}
    for arm in (arm for arm in args.arms if arm != "solve" and "solve" in args.arms):
        gains[arm] = []
        for k in (k for k in ks if k & (k - 1) == 0 or k == args.attempts):
            gain = score_difference(shares(rows, arm, k), shares(rows, "solve", k))
            gains[arm].append([k, gain.value, gain.low, gain.high])
    return curves, gains


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--questions", type=int, default=20)
    add("--candidates", type=int, default=2_000)
    add("--pool", type=int, default=7, help="seed of the candidates")
    add("--probe", type=int, default=600, help="attempts, a multiple of 50")
    add("--attempts", type=int, default=512)
    add("--group", type=int, default=16)
    add("--remembered", type=int, default=3, help="attempts that `dialogue` reads")
    add("--seeds", type=int, default=1)
    add("--lr", type=float, default=1e-4)
    add("--rate", type=float, default=0.01, help="of the teacher's moving average")
    add("--option", action="append", default=[], help="of `scsdpo fit`, for the arm that learns")
    add("--pictures", type=Path, help="folder for discovery.svg and discovery.png")
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    args = parser.parse_args()
    if args.probe % 50 or args.attempts % args.group:
        parser.error("--probe must be a multiple of 50, and --attempts one of --group")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "questions", "pictures")}
    kept = args.out.with_suffix(".jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if lines and lines[0] != {"settings": settings}:
        parser.error(f"{kept} is of a run with other settings: {lines[0]}")

    def keep(line):
        lines.append(line)
        with kept.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    if not lines:
        keep({"settings": settings})
    source, (model, _) = Workings(args.pool), loaded(args, 0)
    hard = [line for line in lines if "question" in line]
    if len(hard) < args.questions:
        for number, found in enumerate(islice(hard_questions(model, source, args), args.questions)):
            if number >= len(hard):
                keep(found)
        hard = [line for line in lines if "question" in line]
    done = {(line["key"], line["seed"]) for line in lines if "seed" in line}
    for found in hard[: args.questions]:
        for seed in range(args.seeds):
            if (found["key"], seed) not in done:
                prompt = source[found["question"]]
                arms = {arm: ARMS[arm](model, prompt, args, seed) for arm in args.arms}
                keep({"key": found["key"], "seed": seed, **arms})
    probes = {line["key"]: line["probe"] for line in hard[: args.questions]}
    rows = [
        {**row, "probe": probes[row["key"]]}
        for row in lines
        if row.get("key") in probes and "seed" in row
    ]
    curves, gains = figures(rows, args)
    record = {
        "settings": settings,
        "candidates": 1 + max(line["question"] for line in hard[: args.questions]),
        "rows": rows,
        "discovery": curves,
        "gain of solve": gains,
    }
    args.out.write_text(json.dumps(record) + "\n")
    if args.pictures:
        ks = range(1, args.attempts + 1)
        labels = {LABELS[arm]: discovered(rows, arm, ks) for arm in args.arms}
        note = f"{len(hard[: args.questions])} questions; bars are 95 % intervals over questions."
        save([discovery_panel(labels, note)], args.pictures)
    powers = [k for k, *_ in next(iter(gains.values()), [])]
    for arm, curve in curves.items():
        cells = (
            f"@{k} {v:.0%} ({low:.0%} .. {high:.0%})" for k, v, low, high in curve if k in powers
        )
        print(f"{arm:8}", "  ".join(cells))
    for arm, gain in gains.items():
        cells = (
            f"@{k} {100 * v:+.0f} ({100 * low:+.0f} .. {100 * high:+.0f})"
            for k, v, low, high in gain
        )
        print(f"solve - {arm}, points:", "  ".join(cells))


if __name__ == "__main__":
    main()
