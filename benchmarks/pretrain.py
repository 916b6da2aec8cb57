"""Make the tiny policy: `python benchmarks/pretrain.py`.

A supervised warm-up on the lab's training questions, in two kinds of example:

* taught: the question in the teacher's template, with a right response as the demonstration. The
  target is a right response in another wording. This makes the in-context teacher strong.
* bare: the question alone, with the response of a beginner, who makes each mistake at a rate of its
  own. This makes the policy well-formed and unsure: right often enough for a group of rollouts to
  hold a success, wrong often enough to have much to learn.

Some taught examples begin after a mistake that is read but not trained on, and continue from it, so
that the teacher stays right after a student's mistakes.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random

import torch
from supervised import (
    Example,
    accuracy,
    build_policy,
    respond,
    train,
    train_tokenizer,
    well_formed,
    write_record,
)
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from scsdpo.lab import LabTasks, Question
from scsdpo.policy import TINY_FOLDER, CausalLM
from scsdpo.teacher.templates import Templates
from scsdpo.types import Prompt, Sampling, stable_hash

MAX_NEW_TOKENS = 64
"""Enough for every right response to a lab question, end-of-sequence included."""
TRAIN_SAMPLING = Sampling(n=4, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
VAL_SAMPLING = Sampling(n=16, temperature=0.6, top_p=0.95, max_new_tokens=MAX_NEW_TOKENS)
PHRASES = (
    "<reasoning>",
    "</reasoning>\n<answer>",
    "</answer>",
    "Action: ",
    '\nAction Input: {"',
    "Thought: I should call ",
    "\nCorrect solution:\n\n",
    "\n\nCorrectly solve the original question.\n",
    "Please reason step by step.",
)
"""Strings of the formats and of the teacher's template, each one token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Shares and rates of the examples.

    Args:
        bare: share of examples without a demonstration.
        stumbling: share of taught examples that begin after a mistake.
        pitfall_rates: lowest and highest rate of a pitfall in bare responses.
        avoided: share of pitfalls that a beginner nearly always avoids; with `fatal`, below 1.
        fatal: share of pitfalls that a beginner nearly always falls into.
    """

    bare: float = 0.3
    stumbling: float = 0.3
    pitfall_rates: tuple[float, float] = (0.1, 0.7)
    avoided: float = 0.0
    fatal: float = 0.0

    def rate(self, pitfall: str) -> float:
        """Rate at which a beginner falls into `pitfall`.

        u in [0, 1] is the hash of its name: 0.01 below `avoided`, 0.95 above 1 - `fatal`, and
        between them even from the lowest to the highest of `pitfall_rates`.
        """
        u = stable_hash("pitfall", pitfall) % 1001 / 1000
        if u < self.avoided:
            return 0.01
        if u > 1 - self.fatal:
            return 0.95
        low, high = self.pitfall_rates
        return low + (high - low) * (u - self.avoided) / (1 - self.avoided - self.fatal)


def examples(mixture: Mixture, seed: int) -> Iterator[Example]:
    """Endless examples from the training split."""
    tasks, rng = LabTasks("train", seed=stable_hash("pretrain", seed)), Random(seed)
    for index in count():
        question = tasks.question(index)
        if rng.random() < mixture.bare:
            yield _bare(question, mixture, rng)
        else:
            yield _taught(question, rng.random() < mixture.stumbling, rng)


def _bare(question: Question, mixture: Mixture, rng: Random) -> Example:
    steps = enumerate(question.pitfalls)
    mistakes = [i for i, pitfall in steps if rng.random() < mixture.rate(pitfall)]
    wording = rng.randrange(question.wordings)
    response = question.response(wording=wording, mistakes=mistakes)
    return Example(messages=question.messages, response=response)


def _taught(question: Question, stumbling: bool, rng: Random) -> Example:
    shown = question.response(wording=rng.randrange(question.wordings))
    step = rng.randrange(len(question.pitfalls))
    mistakes = [step] if stumbling else []
    parts = question.work(wording=rng.randrange(question.wordings), mistakes=mistakes)
    behind = step + 2 if stumbling else 0  # parts: opening, then one a step
    return Example(
        messages=Templates().fill(question.messages, demonstration=shown),
        prefix="".join(parts[:behind]),
        response="".join(parts[behind:]),
    )


def lab_tokenizer(vocab_size: int = 640, questions: int = 4000) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the lab's questions and responses."""
    tasks = LabTasks("train")
    drawn = [tasks.question(i) for i in range(questions)]
    texts = [message["content"] for question in drawn for message in question.messages]
    texts += [q.response(wording=wording) for q in drawn for wording in range(q.wordings)]
    return train_tokenizer(texts, vocab_size, phrases=PHRASES)


def tiny_config(intermediate_size: int = 384, layers: int = 4) -> Qwen3Config:
    """Under a million parameters; head size 64, which vLLM can run on a CPU."""
    return Qwen3Config(
        hidden_size=128,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def pretrain(
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    config: Qwen3Config | None = None,
    mixture: Mixture = Mixture(),
    start: Path | None = None,
    lr: float = 3e-3,
) -> list[float]:
    """Warm up a fresh policy, or the one in folder `start`, and write its folder.

    Returns:
        The losses, one a step.
    """
    torch.manual_seed(seed)
    if start is None:
        tokenizer = lab_tokenizer()
        model = build_policy(config or tiny_config(), tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
    return train(model, tokenizer, examples(mixture, seed), out, steps=steps, lr=lr)


def measure(policy: CausalLM, *, questions: int = 400, seed: int = 0) -> dict[str, object]:
    """The figures of a pretraining record, on held-out questions.

    `bare` and `bare_sharp`: the policy alone, at the temperatures of training and validation.
    `teacher`: shown the gold response; `teacher_by_sibling`: shown a right response of its own,
    where one of the four bare ones was right. Both at temperature 1.
    """
    tasks = LabTasks("val", seed=seed)
    prompts = [tasks[i] for i in range(questions)]
    policy.configure_model()
    _, sharp = respond(policy, prompts, VAL_SAMPLING)
    rollouts, bare = respond(policy, prompts, TRAIN_SAMPLING)
    gold = [tasks.question(i).response(wording=i % 2) for i in range(questions)]
    siblings = [
        next((t for t, v in zip(texts, group, strict=True) if v.reward == 1), "")
        for texts, group in zip(rollouts.texts, bare, strict=True)
    ]
    return {
        "questions": questions,
        "bare": accuracy(prompts, bare),
        "bare_sharp": accuracy(prompts, sharp),
        "well_formed": well_formed(rollouts, bare),
        "teacher": _shown(policy, prompts, gold),
        "teacher_by_sibling": _shown(policy, prompts, siblings),
    }


def _shown(
    policy: CausalLM, prompts: Sequence[Prompt], demonstrations: Sequence[str]
) -> dict[str, float]:
    """Accuracy of the policy with `demonstrations`; prompts with an empty one are omitted."""
    told = [
        replace(p, messages=tuple(Templates().fill(p.messages, demonstration=text)))
        for p, text in zip(prompts, demonstrations, strict=True)
        if text
    ]
    return accuracy(told, respond(policy, told, replace(TRAIN_SAMPLING, n=1))[1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=TINY_FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1300, help="of 64 examples")
    parser.add_argument("--questions", type=int, default=400, help="held out, to measure on")
    parser.add_argument("--start", help="folder of the policy to start from, or `tiny`")
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest of the schedule")
    parser.add_argument("--avoided", type=float, default=0.0, help="see Mixture")
    parser.add_argument("--fatal", type=float, default=0.0, help="see Mixture")
    args = parser.parse_args()
    if args.start is not None:
        args.start = TINY_FOLDER if args.start == "tiny" else Path(args.start)
    mixture = Mixture(avoided=args.avoided, fatal=args.fatal)
    begin = time.monotonic()
    losses = pretrain(
        args.out, steps=args.steps, seed=args.seed, mixture=mixture, start=args.start, lr=args.lr
    )
    seconds = time.monotonic() - begin
    policy = CausalLM(str(args.out))
    write_record(
        args.out,
        "benchmarks/pretrain.py",
        losses,
        seed=args.seed,
        seconds=seconds,
        accuracy=measure(policy, questions=args.questions),
        parameters=policy.language_model.num_parameters(),
    )


if __name__ == "__main__":
    main()
