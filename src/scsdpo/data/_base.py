"""The contract of a data source."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from torch.utils.data import Dataset

from scsdpo.contracts import declared
from scsdpo.types import Prompt, stable_hash

CHECK_AHEAD = 20_000
"""Number of prompts of a stream, or of a user's source, whose gold answers are checked."""


class Source(Dataset[Prompt], ABC):
    """A set of prompts by index: index -> `Prompt`.

    Construction is cheap and checks its arguments; files are opened by the first access, so that
    a mistake in another section of the configuration is reported first. An endless source has a
    nominal length, so that a run has epochs.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of prompts, nominal for an endless source."""

    @abstractmethod
    def __getitem__(self, index: int) -> Prompt:
        """The prompt at `index`, the same each time and in every process."""

    @declared
    @abstractmethod
    def name(self) -> str:
        """Name under which validation metrics of this source are logged."""

    @declared
    def sequential(self) -> bool:
        """True if prompts can be read in order only."""
        return False

    @declared
    def proves_golds(self) -> bool:
        """True if the source itself refuses unreachable gold answers while it reads."""
        return False

    def read(self) -> Iterator[Prompt]:
        """One pass over the prompts, in order."""
        return (self[index] for index in range(len(self)))

    def shuffled(self, seed: int) -> Iterator[Prompt]:
        """One pass over the prompts, in an order that `seed` fixes."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        return (self[int(index)] for index in order)


class Stream(Source):
    """Prompts that are read one after the other: a generator, a set larger than memory or disk.

    They are shuffled within windows; a window's order depends on its number and the seed only. So
    a position in a stream is a count: a resumed run reads again what came before it. After the last
    prompt, reading starts again.

    Args:
        size: nominal number of questions of an epoch, and of a validation.
        window: number of questions in memory that are shuffled together; 1: no shuffling.

    Raises:
        ValueError: if an argument is below 1.
    """

    def __init__(self, *, size: int = 10_000, window: int = 1_000) -> None:
        for name, value in (("size", size), ("window", window)):
            if value < 1:
                raise ValueError(f"`{type(self).__name__}({name}=...)` must be >= 1, got {value}")
        self.size, self.window = size, window

    @abstractmethod
    def read(self) -> Iterator[Prompt]:
        """One pass over the prompts from the beginning, the same each time; it may be endless."""

    @property
    def sequential(self) -> bool:
        """Always true."""
        return True

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at `index`; reads all prompts before it."""
        for prompt in islice(self.read(), index, None):
            return prompt
        raise IndexError(index)

    def shuffled(self, seed: int) -> Iterator[Prompt]:
        """One pass, shuffled within windows."""
        prompts = self.read()
        number = 0
        while window := list(islice(prompts, self.window)):
            Random(stable_hash(seed, number)).shuffle(window)
            yield from window
            number += 1


def source_key(split: str, number: int, sources: int) -> str:
    """Configuration key of source `number` in `train` or `val`, which hold `sources` sources."""
    return f"data.{split}[{number}]" if sources > 1 else f"data.{split}"
