"""Does it learn on real questions? SC-SDPO from a small warm-started policy, on 2 CPU cores.

    python benchmarks/warm_start.py --source DIR [--task configs/tasks/biology.yaml] [--minutes 6]

DIR holds the task's train.json and test.json. Three stages, all in a folder of their own:

1. Warm-up. A tokenizer and a policy of a few million parameters are trained on the training
   questions in the real prompt format. The files hold letters and no worked solutions, so the
   reasoning is a template, and letters are drawn at random, independent of the gold one, in bare
   targets and in demonstrations alike: no answer leaks, and the start is near chance. It goes on
   until at least 95 % of the responses are well formed and the teacher follows the
   demonstration's letter at least 90 % of the time.
2. `scsdpo fit` with configs/qwen3.yaml and the task's file, the policy and the data replaced.
3. mean@16 on the training questions, before -> after, and on the held-out ones. A policy this
   small has no biology to show there: it learns the questions that it was asked.

Prints one JSON line a stage.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import yaml
from supervised import (
    Example,
    build_policy,
    respond,
    save,
    train_tokenizer,
    warm_up,
    well_formed,
)
from transformers import Qwen3Config

from scsdpo.data import SciKnowEval
from scsdpo.policy import CausalLM, Chat
from scsdpo.teacher import Templates
from scsdpo.types import Prompt, Sampling

ROOT = Path(__file__).resolve().parents[1]
WELL_FORMED, FOLLOWS = 0.95, 0.9
OPTION = re.compile(r"^([A-Z]): ", re.MULTILINE)
REASONING = ("I compare the options.", "One option fits best.", "I check each option.")
PHRASES = ("<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>")
"""Strings of the response format, each one token."""


def response(prompt: Prompt, letter: str, rng: Random) -> str:
    """Templated reasoning that quotes the question's end, and a letter, in the asked format."""
    question = prompt.messages[-1]["content"].partition("\n\nA: ")[0]
    thought = f"{rng.choice(REASONING)} {question[-20:]}"
    return f"<reasoning>\n{thought}\n</reasoning>\n<answer>\n{letter}\n</answer>"


def options(prompt: Prompt) -> list[str]:
    """The letters that the question offers."""
    return OPTION.findall(prompt.messages[-1]["content"])


def examples(prompts: list[Prompt], rng: Random) -> Iterator[Example]:
    """Half bare, half with a demonstration; never the gold letter, but by chance."""
    while True:
        for prompt in rng.sample(prompts, len(prompts)):
            letter = rng.choice(options(prompt))
            messages = list(prompt.messages)
            if rng.random() < 0.5:
                shown = response(prompt, letter, rng)
                messages = Templates().fill(prompt.messages, demonstration=shown)
            yield Example(messages=messages, response=response(prompt, letter, rng))


def check(folder: Path, prompts: list[Prompt], rng: Random) -> tuple[float, float]:
    """Share of well-formed responses, and how often the teacher repeats the shown letter."""
    policy = CausalLM(str(folder))
    policy.configure_model()
    sampling = Sampling(n=1, max_new_tokens=48)
    bare = well_formed(*respond(policy, prompts, sampling))
    letters = [rng.choice(options(prompt)) for prompt in prompts]
    told = [
        replace(
            p, messages=tuple(Templates().fill(p.messages, demonstration=response(p, letter, rng)))
        )
        for p, letter in zip(prompts, letters, strict=True)
    ]
    _, verdicts = respond(policy, told, sampling)
    follows = [v[0].answer == letter for v, letter in zip(verdicts, letters, strict=True)]
    return bare, sum(follows) / len(follows)


def warm_start(prompts: list[Prompt], out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Stage 1: rounds of supervised steps until both thresholds are reached."""
    rng = Random(args.seed)
    torch.manual_seed(args.seed)
    texts = [message["content"] for prompt in prompts for message in prompt.messages]
    texts += [response(prompt, "A", rng) for prompt in prompts]
    tokenizer = train_tokenizer(texts, args.vocabulary, phrases=PHRASES)
    config = Qwen3Config(
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = build_policy(config, tokenizer)
    chat = Chat(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,))
    start, steps = time.perf_counter(), 0
    formed = follows = 0.0
    while not (formed >= WELL_FORMED and follows >= FOLLOWS):
        if steps >= 8 * args.warmup_steps:
            raise SystemExit(f"no good start after {steps} steps: {formed:.2f}, {follows:.2f}")
        for _ in warm_up(
            model, chat, examples(prompts, rng), steps=args.warmup_steps, batch_size=16, lr=2e-3
        ):
            steps += 1
        save(model, tokenizer, out)
        formed, follows = check(out, rng.sample(prompts, min(200, len(prompts))), rng)
    return {
        "parameters": model.num_parameters(),
        "warmup_steps": steps,
        "well_formed": round(formed, 3),
        "teacher_follows": round(follows, 3),
        "seconds": round(time.perf_counter() - start),
    }


def fit(args: argparse.Namespace, out: Path) -> None:
    """Run the command line with the paper's configuration, policy and data replaced."""
    subprocess.run(
        [
            *(sys.executable, "-m", "scsdpo", "fit"),
            f"--config={ROOT / 'configs' / 'qwen3.yaml'}",
            f"--config={args.task}",
            f"--model.policy.name_or_path={out / 'policy'}",
            f"--data.train.source={args.source}",
            f"--data.val.source={args.source}",
            "--trainer.precision=32-true",
            f"--trainer.logger.init_args.save_dir={out / 'runs'}",
            "--trainer.enable_progress_bar=false",
            "--model.sampling.max_new_tokens=48",
            "--model.val_sampling.max_new_tokens=48",
            f"--model.optimizer.lr={args.lr}",
            f"--seed_everything={args.seed}",
            "--trainer.limit_val_batches=0",
            "--checkpoint.monitor=null",
            "--checkpoint.save_top_k=0",
            "--trainer.max_steps=100000",
            f"--trainer.max_time=00:00:{args.minutes:02d}:00",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def mean_at_16(folder: Path, prompts: list[Prompt]) -> float:
    """Give percentages, sampled as in validation."""
    policy = CausalLM(str(folder))
    policy.configure_model()
    sampling = Sampling(n=16, max_new_tokens=48, temperature=0.6, top_p=0.95)
    _, verdicts = respond(policy, prompts, sampling)
    rewards = [verdict.reward for group in verdicts for verdict in group]
    return round(100 * sum(rewards) / len(rewards), 1)


def train(args: argparse.Namespace, out: Path) -> dict[str, float]:
    """Stage 2; the trained policy goes to `out / "trained"`, by `scsdpo export`."""
    start = time.perf_counter()
    fit(args, out)
    seconds = round(time.perf_counter() - start)
    (checkpoint,) = (out / "runs").rglob("last.ckpt")
    command = [sys.executable, "-m", "scsdpo", "export", f"--ckpt={checkpoint}"]
    subprocess.run([*command, f"--out={out / 'trained'}"], check=True, stdout=subprocess.DEVNULL)
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    return {"steps": steps, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="folder with train.json and test.json")
    parser.add_argument("--task", type=Path, default=ROOT / "configs" / "tasks" / "biology.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--minutes", type=int, default=6, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--warmup-steps", type=int, default=250, help="a round")
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; choose a new folder")
    settings = yaml.safe_load(args.task.read_text())["data"]["train"]["init_args"]
    if "domain" not in settings:
        parser.error(f"--task: {args.task} has no letters to choose from; name a science task")
    domain = settings["domain"]
    source = SciKnowEval(domain, "train", source=args.source)
    prompts = [source[i] for i in range(len(source))]
    print(json.dumps({"warm-up": warm_start(prompts, args.out / "policy", args)}), flush=True)
    print(json.dumps({"train": train(args, args.out)}), flush=True)
    held_out = SciKnowEval(domain, "test", source=args.source)
    unseen = [held_out[i] for i in range(len(held_out))]
    for name, questions in {"training questions": prompts, "held-out questions": unseen}.items():
        before, after = (mean_at_16(args.out / each, questions) for each in ("policy", "trained"))
        row = {"before": before, "after": after, "rise": round(after - before, 1)}
        print(json.dumps({name: {"mean@16": row}}), flush=True)


if __name__ == "__main__":
    main()
