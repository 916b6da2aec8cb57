"""Make the tiny policy of the lab's store: `python benchmarks/pretrain_store.py`.

A supervised warm-up on training requests, as in `pretrain.py`, in two kinds of example. Each
example draws the store's rules anew, so that the policy does not learn which goods must be wrapped
or to which cities parcels must be cooled.

* bare: the request alone, with the episode of a beginner, who wraps and cools by habit. The rate
  differs by good and city, and is right in this store as often as not. Sometimes the beginner does
  not count, or takes another number.
* taught: the request in the teacher's template, with a right episode, or with the feedback on a
  wrong one. The target is the right episode under the same rules. Some examples begin after
  mistakes that are read but not trained on, and continue from them.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise, product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Literal

import torch
from pretrain import tiny_config
from supervised import (
    ROLES,
    Example,
    Turn,
    accuracy,
    build_policy,
    train,
    train_tokenizer,
    write_record,
)
from transformers import PreTrainedTokenizerFast

from scsdpo.data.rendered import rendered
from scsdpo.environments.store import CITIES, GOODS, Store
from scsdpo.lab import StoreTasks
from scsdpo.policy import TINY_TOOLS_FOLDER, CausalLM
from scsdpo.prompt import Episode, Part
from scsdpo.rollout import HFRollout
from scsdpo.teacher.templates import Templates
from scsdpo.types import Prompt, Sampling, Verdict, stable_hash
from scsdpo.verifiers import Episodes, Verification, VerifierPool

TRAIN_SAMPLING = Sampling(n=4, temperature=1.0, max_new_tokens=128)
VAL_SAMPLING = Sampling(n=16, temperature=0.6, top_p=0.95, max_new_tokens=128)

PHRASES = (
    "Action: ",
    '\nAction Input: {"good": "',
    '\nAction Input: {"city": "',
    "\nAction Input: {}",
    '", "number": ',
    '"}',
    "\n\n[tool ",
    "]\n",
    "\n[/tool]\n\n",
    "\nCorrect solution:\n\n",
    "\nThe following is feedback from your unsuccessful earlier attempt:\n\n",
    "\n\nCorrectly solve the original question.\n",
    "Error: ValueError: ",
)
"""Strings of calls, of transcripts and of the teacher's template, each one token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """Steps for a request: count, take, perhaps wrap, perhaps cool, send."""

    counts: bool = True
    taken: int | Literal["counted", "counted less kept"] = "counted less kept"
    """The number to take: fixed beforehand, or computed from the count."""
    wraps: bool
    cools: bool

    def calls(self, row: Mapping[str, Any]) -> list[str]:
        """The responses, a call each."""
        taken: dict[Any, int] = {
            "counted": row["stock"],
            "counted less kept": row["stock"] - row["keep"],
        }
        calls = [
            [self.counts, "count", {"good": row["good"]}],
            [True, "take", {"good": row["good"], "number": taken.get(self.taken, self.taken)}],
            [self.wraps, "wrap", {}],
            [self.cools, "cool", {}],
            [True, "send", {"city": row["city"]}],
        ]
        return [
            f"Action: {tool}\nAction Input: {json.dumps(arguments)}"
            for is_made, tool, arguments in calls
            if is_made
        ]


def right_script(prompt: Prompt) -> Script:
    """The right script for a request, made with knowledge of the store's rules."""
    store = prompt.verifier
    assert isinstance(store, Store)
    return Script(
        wraps=prompt.row["good"] in store.wrapped, cools=prompt.row["city"] in store.cooled
    )


def play(prompt: Prompt, responses: Sequence[str]) -> Episode:
    """The episode with these responses, up to its end or the last response."""
    store = prompt.verifier
    state, parts = store.begin(prompt), []
    for response in responses:
        parts.append(Part(role="assistant", text=response))
        answer = store.step(prompt, state, response)
        if isinstance(answer, Verdict):
            return Episode(parts=tuple(parts), verdict=answer)
        said = [
            Part(role=each["role"], text=each["content"], name=each.get("name", ""))
            for each in answer.messages
        ]
        parts += [replace(said[0], feedback=answer.feedback), *said[1:]]
    return Episode(parts=tuple(parts))


def scripts() -> Iterator[Script]:
    """Every script that does not learn.

    The rules of a store are arbitrary, and nothing in an episode shows them before its end. Without
    having learned them, all goods and all cities look alike, so the choice to wrap and to cool is
    the same for all. The number is free: with or without counting, the count, the count less the
    number to keep, or any number from 1 to 9.
    """
    numbers: list[Any] = ["counted", "counted less kept", *range(1, 10)]
    for taken, counts, wraps, cools in product(numbers, *3 * [(False, True)]):
        if counts or isinstance(taken, int):
            yield Script(counts=counts, taken=taken, wraps=wraps, cools=cools)


def score(script: Script, prompts: Sequence[Prompt]) -> float:
    """Mean reward of a script, by playing it."""
    verdicts = [play(prompt, script.calls(prompt.row)).verdict for prompt in prompts]
    return fmean(verdict.reward if verdict else 0.0 for verdict in verdicts)


def best_script(prompts: Sequence[Prompt]) -> tuple[Script, float]:
    """The best of `scripts`, and its mean reward."""
    return max(((each, score(each, prompts)) for each in scripts()), key=lambda pair: pair[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Shares and rates of the examples.

    Args:
        bare: share of examples without a demonstration or feedback.
        feedback: share of taught examples with feedback instead of an episode.
        stumbling: share of taught examples that begin after mistakes.
        uncounted: rate at which a beginner takes without counting.
        miscounted: rate at which a beginner takes another number than the right one.
        habits: lowest and highest rate at which a beginner wraps a good, or cools for a city.
    """

    bare: float = 0.35
    feedback: float = 0.15
    stumbling: float = 0.3
    uncounted: float = 0.03
    miscounted: float = 0.04
    habits: tuple[float, float] = (0.2, 0.8)

    def habit(self, name: str, among: Sequence[str]) -> float:
        """Rate at which a beginner wraps or cools for `name`.

        The rates are evenly spread from the lowest to the highest of `habits`, in the order of the
        names' hashes.
        """
        low, high = self.habits
        order = sorted(among, key=lambda each: stable_hash("scsdpo.store", "habit", each))
        return low + (high - low) * order.index(name) / (len(order) - 1)


def examples(mixture: Mixture, seed: int) -> Iterator[Example]:
    """Endless examples from the training split."""
    tasks, rng = StoreTasks("train", seed=stable_hash("pretrain", seed)), Random(seed)
    for index in count():
        good, city = GOODS[index % len(GOODS)], CITIES[index // len(GOODS) % len(CITIES)]
        rules = Store(
            wrapped=(good,) if rng.random() < 0.5 else (),
            cooled=(city,) if rng.random() < 0.5 else (),
        )
        prompt = replace(tasks[index], verifier=rules)
        if rng.random() < mixture.bare:
            yield _example(prompt, beginner(prompt, mixture, rng).calls(prompt.row))
        else:
            yield _taught(prompt, mixture, rng)


def beginner(prompt: Prompt, mixture: Mixture, rng: Random) -> Script:
    """The script of a beginner, who does not know this store."""
    stock, counts = prompt.row["stock"], rng.random() >= mixture.uncounted
    wrong = not counts or rng.random() < mixture.miscounted
    return Script(
        counts=counts,
        taken=rng.randint(1, stock) if wrong else "counted less kept",
        wraps=rng.random() < mixture.habit(prompt.row["good"], GOODS),
        cools=rng.random() < mixture.habit(prompt.row["city"], CITIES),
    )


def _taught(prompt: Prompt, mixture: Mixture, rng: Random) -> Example:
    right = right_script(prompt).calls(prompt.row)
    demonstration, feedback = play(prompt, right).transcript(), ""
    if rng.random() < mixture.feedback:
        failed = play(prompt, beginner(prompt, mixture, rng).calls(prompt.row)).feedback
        demonstration, feedback = ("", failed) if failed else (demonstration, "")
    filled = Templates().fill(prompt.messages, demonstration=demonstration, feedback=feedback)
    told = replace(prompt, messages=tuple(filled))
    if rng.random() >= mixture.stumbling:
        return _example(told, right)
    calls = beginner(prompt, mixture, rng).calls(prompt.row)
    done = calls[: rng.randrange(1, len(calls))]
    made = {_tool(call) for call in done}
    if "take" in made:
        made.add("count")
    rest = [call for call in right if _tool(call) not in made]
    return _example(told, [*done, *rest], read=len(done))


def _tool(call: str) -> str:
    return call.partition("\n")[0].removeprefix("Action: ")


def _example(prompt: Prompt, calls: Sequence[str], *, read: int = 0) -> Example:
    """The episode of these calls; the first `read` of them are not trained on."""
    parts = play(prompt, calls).parts
    said = [place for place, part in enumerate(parts) if part.role == "assistant"]
    turns = [
        Turn(
            observed=[
                {"role": part.role, "name": part.name, "content": part.text}
                for part in parts[before + 1 : place]
            ],
            response=parts[place].text,
            is_learned=number >= read,
        )
        for number, (before, place) in enumerate(pairwise(said), start=1)
    ]
    return Example(
        messages=prompt.messages, response=parts[0].text, is_learned=read == 0, turns=turns
    )


def store_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer trained on requests, episodes and feedback."""
    drawn = islice(examples(Mixture(), 0), 2000)
    texts = [
        text
        for example in drawn
        for text in (
            example.messages[-1]["content"],
            example.response,
            *(turn.response for turn in example.turns),
            *(said["content"] for turn in example.turns for said in turn.observed),
        )
    ]
    return train_tokenizer(texts, 360, phrases=PHRASES, roles=(*ROLES, "<|tool|>"))


def measure(policy: CausalLM) -> dict[str, object]:
    """The figures of a pretraining record, on held-out requests, each good with each city once.

    `bare` and `bare_sharp`: the policy alone, at the temperatures of training and validation,
    overall and by the calls that a request takes; `well_formed`: the share of episodes in which
    something was sent. `teacher`: shown a right episode. `teacher_by_feedback`: told what was wrong
    with an attempt that counts, takes the right number, and has both cares wrong.
    """
    tasks = StoreTasks("val")
    prompts = [tasks[index] for index in range(len(GOODS) * len(CITIES))]
    policy.configure_model()
    bare = respond(policy, prompts, TRAIN_SAMPLING)
    rights = [right_script(prompt) for prompt in prompts]
    shown, blamed = [], []
    for prompt, right in zip(prompts, rights, strict=True):
        wrong = replace(right, wraps=not right.wraps, cools=not right.cools)
        episodes = [play(prompt, script.calls(prompt.row)) for script in (right, wrong)]
        fill = Templates().fill
        told = fill(prompt.messages, demonstration=episodes[0].transcript())
        shown.append(replace(prompt, messages=tuple(told)))
        told = fill(prompt.messages, feedback=episodes[1].feedback)
        blamed.append(replace(prompt, messages=tuple(told)))

    def right_of(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
        return accuracy(prompts, verdicts, strata=lambda prompt: (prompt.category,))

    sent = [verdict.answer is not None for group in bare for verdict in group]
    return {
        "questions": len(prompts),
        "bare": right_of(bare),
        "bare_sharp": right_of(respond(policy, prompts, VAL_SAMPLING)),
        "well_formed": sum(sent) / len(sent),
        "teacher": right_of(respond(policy, shown, TRAIN_SAMPLING)),
        "teacher_by_feedback": right_of(respond(policy, blamed, TRAIN_SAMPLING)),
    }


def respond(policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Verdict]]:
    """Verdicts [Q][n] on episodes that the policy plays."""
    asked = [rendered(prompt, policy.chat) for prompt in prompts]
    pool = VerifierPool(Verification(workers=0))
    with Episodes(pool, asked, sampling.n) as episodes:
        drawn = HFRollout().play(policy, asked, sampling, episodes)
    return [[episode.verdict for episode in group if episode.verdict] for group in drawn.episodes]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=TINY_TOOLS_FOLDER, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="of 64 examples")
    args = parser.parse_args()
    begin = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = store_tokenizer()
    model = build_policy(tiny_config(intermediate_size=256, layers=3), tokenizer)
    losses = train(model, tokenizer, examples(Mixture(), args.seed), args.out, steps=args.steps)
    seconds = time.monotonic() - begin
    policy = CausalLM(str(args.out))
    write_record(
        args.out,
        "benchmarks/pretrain_store.py",
        losses,
        seed=args.seed,
        seconds=seconds,
        accuracy=measure(policy),
        parameters=policy.language_model.num_parameters(),
    )


if __name__ == "__main__":
    main()
