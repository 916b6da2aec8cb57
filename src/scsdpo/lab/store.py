"""Parcels to be sent from a store: the requests of the lab's task of several turns."""

from random import Random
from typing import Literal

from scsdpo.data._base import Source
from scsdpo.environments.store import CITIES, GOODS, Store
from scsdpo.types import Prompt, stable_hash

STOCKS, KEPT = range(5, 10), range(1, 5)
VAL_SHARE = 5
"""One request in this many belongs to validation."""
REQUEST = "Send {good} to {city}, keep {keep}."


class StoreTasks(Source):
    """Requests to send parcels from a `Store`, endless and without files.

    Request i depends on (split, seed, i) only. Goods and cities alternate: 96 successive requests
    have each good with each city once. With the stock there are 1,920 different requests; a hash
    decides which belong to validation, so for any seeds none is in both splits. Categories name the
    number of calls needed: calls3, calls4, calls5.

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
        """Always `store`."""
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
