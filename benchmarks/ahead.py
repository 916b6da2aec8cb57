"""Sampling ahead: what old samples cost on the lab, and what servers that draw meanwhile save.

    python benchmarks/ahead.py study [--methods grpo sc-sdpo srpo sdpo-hybrid] [--ages 0 1 4]
                                     [--far grpo sc-sdpo] [--far-ages 8] [--seeds 3] [--lr 1e-4]
                                     [--batches 150] [--jobs 2] [--out runs/ahead]
    python benchmarks/ahead.py clock [--sampling 3.0] [--learning 3.0] [--batches 8]

`study`: the policy, questions and steps of `study.py`, with `model.ahead.batches` at each age;
HFRollout, hence a simulation. A method is as its file has it, importance included. Whatever in
--out is done is not done again. Writes ahead.json (a row a run) and ahead.md: mean@16 at the end
with Student's 95 % interval over the seeds, and what differs from age 0, paired by seed.

`clock`: a run of the shipped policy against a made-up server that takes --sampling seconds for a
batch, with --learning seconds of sleep beside each update, at age 0 and 1. Prints seconds a batch,
from the second batch on, beside the sum and the larger of sampling and learning as measured: the
update itself takes its time. The rest is the delivery of weights.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from study import QUESTIONS, ROOT, job, refuse_failures, run_and_read, start_policy

from scsdpo.io.files import write_whole
from scsdpo.policy.location import TINY
from scsdpo.statistics import mean_interval

METHODS = ("grpo", "sc-sdpo", "srpo", "sdpo-hybrid")


def cells(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Method and age."""
    near = [(method, age) for method in args.methods for age in args.ages]
    return [*near, *((method, age) for method in args.far for age in args.far_ages)]


def study(args: argparse.Namespace) -> None:
    """Run what is missing, and write the tables."""
    args.out = args.out.resolve()
    args.base = TINY
    args.start = start_policy(args.out, args.base)
    rows: list[dict] = []
    todo: dict = {}
    for seed in range(args.seeds):
        for method, age in cells(args):
            keys = {
                "data.train.size": args.batches * QUESTIONS,
                "data.val.seed": 0,
                "data.val.size": args.val_size,
                "trainer.limit_train_batches": args.batches,
                "trainer.val_check_interval": args.batches,
                "model.ahead.batches": age,
            }
            run = job(args, args.out / "runs" / f"age{age}", method, args.lr, seed, **keys)
            todo[run] = (method, args.lr, seed)
    results = run_and_read(todo, args.jobs)
    for row, run in zip(results, [run for run in todo if run.is_done()], strict=True):
        log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        rows.append(row | {"age": int(run.folder.parents[2].name[3:])} | ages(log))
    write_whole(args.out / "ahead.json", json.dumps(rows, indent=1) + "\n")
    write_whole(args.out / "ahead.md", table(rows))
    print(table(rows))
    refuse_failures(rows, todo)


def ages(log: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the run of the figures that tell how old samples were, and what they weighed."""
    found = {}
    for name in ("age_steps", "importance_ess", "ratio_ess", "logprob_drift", "importance_capped"):
        values = [row[f"train/{name}"] for row in log if f"train/{name}" in row]
        if values:
            found[name] = sum(values) / len(values)
    return found


def table(rows: Sequence[dict]) -> str:
    """One line a method and age."""
    lines = [
        "| method | age | mean@16 | against age 0 | drift, nats | ESS of ratios |",
        "|---|---|---|---|---|---|",
    ]
    of = {(row["method"], row["age"], row["seed"]): row for row in rows}
    for method, age in dict.fromkeys((row["method"], row["age"]) for row in rows):
        seeds = sorted(seed for m, a, seed in of if (m, a) == (method, age))
        mine = [of[method, age, seed]["mean@16"] for seed in seeds]
        here = mean_interval(mine)
        both = [seed for seed in seeds if (method, 0, seed) in of]
        more = [of[method, age, s]["mean@16"] - of[method, 0, s]["mean@16"] for s in both]
        apart = mean_interval(more) if age and len(both) > 1 else None
        told = f"{apart.value:+.3f} ({apart.low:+.3f} .. {apart.high:+.3f})" if apart else ""
        means = []
        for name in ("logprob_drift", "ratio_ess"):
            known = [of[method, age, seed][name] for seed in seeds if name in of[method, age, seed]]
            means.append(f"{sum(known) / len(known):.3f}" if known else "")
        value = f"{here.value:.3f} ({here.low:.3f} .. {here.high:.3f})"
        lines.append(f"| {method} | {age} | {value} | {told} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def clock(args: argparse.Namespace) -> None:
    """Seconds a batch, against a server that answers after a fixed delay."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from canned_vllm import Paced, serving
    from runs import Toys, data, module, trainer
    from scsdpo.callbacks.rollouts import RolloutCallback
    from scsdpo.loss import SamplerImportance
    from scsdpo.metrics import GapCheck
    from scsdpo.policy import TINY_FOLDER, CausalLM
    from scsdpo.rollout import Download, Servers, VLLMRollout
    from scsdpo.rollout.servers import server as servers
    from scsdpo.teacher import EMA, PlainPrompt
    from scsdpo.training import Ahead
    from scsdpo.types import Sampling
    from scsdpo.weighting import Uniform

    servers.refusal = lambda *_: ""  # it loads nothing

    class Slow(RolloutCallback):
        def __init__(self) -> None:
            self.begins: list[float] = []
            self.ends: list[float] = []

        def on_batch(self, trainer: object, module: object, batch: object) -> None:
            self.begins.append(time.monotonic())
            time.sleep(args.learning)

        def on_train_batch_end(self, *_: object) -> None:
            self.ends.append(time.monotonic())

    for age in (0, 1):
        with serving() as server, TemporaryDirectory() as folder:
            paced, slow = Paced(server, args.sampling), Slow()
            model = module(
                None,
                CausalLM(str(TINY_FOLDER), self_check=False),
                rollout=VLLMRollout(Servers([server.url], Download())),
                importance=SamplerImportance(),
                gap=GapCheck(warn=float("inf"), stop=float("inf")),
                sampling=Sampling(n=4, max_new_tokens=16),
                teacher=EMA(context=PlainPrompt()),
                weighting=Uniform(),
                ahead=Ahead(batches=age),
            )
            limits = {"max_steps": args.batches, "max_epochs": -1, "limit_val_batches": 0}
            run = trainer(Path(folder), callbacks=[slow], **limits)
            run.fit(model, data(Toys(4 * args.batches)))
            each = (slow.ends[-1] - slow.ends[0]) / (len(slow.ends) - 1)
            spans = [end - begin for begin, end in zip(slow.begins, slow.ends, strict=True)]
            learning = statistics.fmean(spans[1:])
            sampling = statistics.fmean(end - begin for begin, end, *_ in paced.drew)
            print(
                f"age {age}: {each:.2f} s a batch; sampling {sampling:.2f}, learning "
                f"{learning:.2f}, sum {sampling + learning:.2f}, larger "
                f"{max(sampling, learning):.2f}",
                file=sys.stderr,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    of_study = commands.add_parser("study")
    of_study.add_argument("--methods", nargs="+", default=METHODS)
    of_study.add_argument("--ages", nargs="+", type=int, default=[0, 1, 4])
    of_study.add_argument("--far", nargs="*", default=["grpo", "sc-sdpo"])
    of_study.add_argument("--far-ages", nargs="*", type=int, default=[8])
    of_study.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    of_study.add_argument("--lr", type=float, default=1e-4)
    of_study.add_argument("--batches", type=int, default=150, help="of 16 questions")
    of_study.add_argument("--val-size", type=int, default=512, help="held-out questions")
    of_study.add_argument("--jobs", type=int, default=2, help="processes at a time")
    of_study.add_argument("--out", type=Path, default=Path("runs/ahead"))
    of_clock = commands.add_parser("clock")
    of_clock.add_argument("--sampling", type=float, default=3.0, help="seconds of a batch")
    of_clock.add_argument("--learning", type=float, default=3.0, help="seconds of a batch")
    of_clock.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    study(args) if args.command == "study" else clock(args)


if __name__ == "__main__":
    main()
