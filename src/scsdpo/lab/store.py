"""Parcels to be sent from a store: the lab's task of several turns, and scripts that work it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from statistics import fmean
from typing import Any, Literal

from scsdpo.data._base import Source
from scsdpo.environments.store import CITIES, GOODS, Store
from scsdpo.prompt import Episode, Part
from scsdpo.types import Prompt, Verdict, stable_hash

STOCKS, KEPT = range(5, 10), range(1, 5)
VAL_SHARE = 5
"""One request in this many belongs to validation."""
REQUEST = "Send {good} to {city}, keep {keep}."


class StoreTasks(Source):
    """Requests to send parcels from a `Store`, endless and without files.

    Request i depends on (split, seed, i) alone. Goods and cities take turns: a stretch of 96
    requests has each good with each city once. There are 1,920 requests, with what is in store; one
    belongs to validation iff its hash says so: whatever the seeds, none is in both. Categories are
    the calls that it takes: calls3, calls4, calls5.

    Args:
        split: "train" or "val".
        seed: another seed gives other requests.
        size: nominal length; must be >= 1. Indices beyond it work too.
        environment: the store.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        split: Literal["train", "val"],
        *,
        seed: int = 0,
        size: int = 100_000,
        environment: Store = Store(),
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"`StoreTasks(split=...)` must be 'train' or 'val', got {split!r}")
        if size < 1:
            raise ValueError(f"`StoreTasks(size=...)` must be >= 1, got {size}")
        self.split, self.seed, self.size, self.environment = split, seed, size, environment

    def __len__(self) -> int:
        return self.size

    @property
    def name(self) -> str:
        """`store`."""
        return "store"

    def __getitem__(self, index: int) -> Prompt:
        good = GOODS[index % len(GOODS)]
        city = CITIES[index // len(GOODS) % len(CITIES)]
        rng = Random(stable_hash("scsdpo.store", self.split, self.seed, index))
        while True:
            stock, keep = rng.choice(STOCKS), rng.choice(KEPT)
            held_out = stable_hash("scsdpo.store", good, city, stock, keep) % VAL_SHARE == 0
            if held_out == (self.split == "val"):
                break
        row = {"good": good, "city": city, "keep": keep, "stock": stock}
        care = (good in self.environment.wrapped) + (city in self.environment.cooled)
        return Prompt(
            key=f"{self.name}/{self.split}/{self.seed}/{index}",
            messages=({"role": "user", "content": REQUEST.format(**row)},),
            verifier=self.environment,
            answer="",
            row=row,
            category=f"calls{3 + care}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """How one works a request: count, take, perhaps wrap, perhaps cool, send."""

    counts: bool = True
    taken: int | Literal["counted", "counted less kept"] = "counted less kept"
    """How many; a number that is fixed beforehand, or one that follows from what was counted."""
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
    """The script that is right for a request: it knows the rules of its store."""
    store = prompt.verifier
    assert isinstance(store, Store)
    return Script(
        wraps=prompt.row["good"] in store.wrapped, cools=prompt.row["city"] in store.cooled
    )


def play(prompt: Prompt, responses: Sequence[str]) -> Episode:
    """The episode in which these responses are given, up to its end or theirs."""
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

    The rules of a store are arbitrary, and nothing in an episode tells of them before its end. Who
    has not learned them cannot tell one good or city from another: whether to wrap and to cool is
    the same for all. The number is free: with or without counting, what is counted, that less what
    is to stay, or any number from 1 to 9.
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
