"""`scsdpo solve`: attempt one question, and learn from wrong attempts until one is right."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import lightning as L

from scsdpo.cli.offline import run_offline
from scsdpo.cli.options import check_new_folder, own_parser
from scsdpo.data import Source, TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.io.files import write_whole
from scsdpo.selection import Everything, Selection
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Judged, Prompt

ATTEMPTS, SOLUTION, POLICY = "attempts.jsonl", "solution.json", "policy.ckpt"
SCHEMA_VERSION = 1


def options() -> argparse.ArgumentParser:
    """The command's own options, beside the keys of a configuration."""
    parser = own_parser(
        "solve",
        "Attempt one question, model.sampling.n attempts at a time, and take an optimizer step "
        "after each batch without a right one, until one is right or the attempts are spent. The "
        "teacher's context decides what is learned from wrong attempts: the verifier's feedback, "
        "or earlier attempts (configs/methods/sdpo-solve.yaml).",
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder for attempts and solution",
    )
    add(
        "--question",
        default="0",
        metavar="N|KEY",
        help="the question to solve: its index from 0, or its key",
    )
    add(
        "--split",
        choices=("train", "val"),
        default="train",
        help="take the question from data.train or from data.val (train)",
    )
    add("--attempts", type=int, default=512, metavar="N", help="attempts, at most (512)")
    add("--keep", action="store_true", help=f"save the trained policy as DIR/{POLICY}")
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo solve` on the command line.
    """
    given, rest = options().parse_known_args(args)
    if given.attempts < 1:
        raise ConfigurationError(f"--attempts must be >= 1, got {given.attempts}")
    check_new_folder(given.out)

    def work(trainer: L.Trainer, model: PolicyOptimizer, data: TaskDataModule) -> None:
        sources = data.train_sources if given.split == "train" else data.val_sources
        prompt = prompt_of(sources, given.question, f"data.{given.split}")
        found = solve(trainer, model, data, prompt, attempts=given.attempts, out=given.out)
        if given.keep:
            trainer.save_checkpoint(given.out / POLICY)
        rate = f"{found.attempts} attempts, {found.steps} optimizer steps"
        print(f"solved: {rate}" if found.solved else f"not solved: {rate}")
        print(given.out / SOLUTION)

    own = (
        f"--trainer.default_root_dir={given.out}",
        "--trainer.max_epochs=-1",
        "--trainer.max_steps=-1",
        "--trainer.limit_train_batches=1.0",
        "--trainer.limit_val_batches=0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_checkpointing=false",
        "--trainer.callbacks=null",
        # A batch without credit is an attempt all the same.
        f"--model.limits.max_idle_batches={given.attempts}",
    )
    run_offline("solve", [*rest, *own], work)


def prompt_of(sources: Sequence[Source], question: str, key: str) -> Prompt:
    """The prompt that `--question` names.

    Args:
        sources: in order; indices count through all of them.
        question: an index, or a key.
        key: configuration key of the sources, for messages.

    Raises:
        ConfigurationError: if there is no such question.
    """
    prompts: Iterator[Prompt] = (p for s in sources for p in islice(s.read(), len(s)))
    if question.isdecimal():
        for prompt in islice(prompts, int(question), None):
            return prompt
        total = sum(map(len, sources))
        raise ConfigurationError(f"--question {question}: {key} has {total} questions, from 0")
    for prompt in prompts:
        if prompt.key == question:
            return prompt
    raise ConfigurationError(f"--question {question}: no question of {key} has this key")


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Result of the attempts at one question."""

    key: str
    solved: bool
    attempts: int
    """Attempts made; if solved, those of the last batch count up to the first right one."""
    steps: int
    """Optimizer steps before the last batch."""
    response: str
    """The first right attempt; empty: none was right."""
    answer: str | None
    """The answer that the verifier extracted from it."""
    seconds: float


def solve(
    trainer: L.Trainer,
    model: PolicyOptimizer,
    data: TaskDataModule,
    prompt: Prompt,
    *,
    attempts: int,
    out: Path,
) -> Solution:
    """Attempt one question until it is solved.

    A batch is `model.sampling.n` attempts. If one of them reaches `model.success_threshold`, the
    question is solved, and nothing is learned from the batch. Else the configured teacher,
    advantage and weighting give credit, and an optimizer step is taken; without any credit none is
    taken, and the next batch is drawn from the same policy.

    Args:
        trainer: without limits on epochs and steps, and without validation.
        model: whose policy learns; it is changed.
        data: its sources are replaced by the question.
        prompt: the question.
        attempts: at most so many; of the last batch, attempts beyond this number do not count.
        out: folder for `attempts.jsonl`, written batch by batch, and `solution.json`.

    Raises:
        ConfigurationError: if `model.selection` waits for other questions.

    Source:
        Hübotter et al. 2026 (SDPO), arXiv:2601.20802, section 5: test-time self-distillation.
    """
    if not isinstance(model.selection, Everything):
        raise ConfigurationError(
            f"model.selection: {type(model.selection).__name__} waits for several questions, and "
            "`scsdpo solve` has one; choose Everything"
        )
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    tries = _Attempts(out / ATTEMPTS, attempts, trainer)
    model.selection = tries
    data.train_sources, data.val_sources = [_One(prompt)], []
    data.train_weights, data.questions_per_batch = (), 1
    trainer.fit(model, datamodule=data)
    found = Solution(
        key=prompt.key,
        solved=tries.solved,
        attempts=tries.made,
        steps=tries.steps,
        response=tries.response,
        answer=tries.answer,
        seconds=round(time.monotonic() - begin, 1),
    )
    record = {"schema_version": SCHEMA_VERSION, "kind": "solution", **asdict(found)}
    write_whole(out / SOLUTION, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return found


class _One(Source):
    """A source that holds one question, asked in every batch."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Prompt:
        return self.prompt

    @property
    def name(self) -> str:
        return "question"


class _Attempts(Selection):
    """Records the attempts; selects a batch for learning only if no attempt in it is right."""

    def __init__(self, path: Path, most: int, trainer: L.Trainer) -> None:
        self.path, self.most, self.trainer = path, most, trainer
        self.made = self.steps = 0
        self.solved, self.response = False, ""
        self.answer: str | None = None

    def select(self, judged: Judged) -> tuple[Judged, ...]:
        self.steps = self.trainer.global_step
        lines = []
        left = self.most - self.made
        (verdicts,), (texts,), (successes,) = judged.verdicts, judged.texts, judged.successes
        rows = zip(verdicts, texts, successes.tolist(), judged.lengths[0].tolist(), strict=True)
        for verdict, text, right, length in islice(rows, left):
            self.made += 1
            lines.append(
                {
                    "attempt": self.made,
                    "step": self.steps,
                    "response": text,
                    "tokens": length,
                    **asdict(verdict),
                    "success": right,
                }
            )
            if right:
                self.solved, self.response, self.answer = True, text, verdict.answer
                break
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if self.solved or self.made >= self.most:
            self.trainer.should_stop = True
            return ()
        return (judged,)
