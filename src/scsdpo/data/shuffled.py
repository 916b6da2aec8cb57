"""The endless order in which the questions of each training source are asked."""

import itertools
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch.utils.data import Dataset

from scsdpo.data._base import Source, source_key
from scsdpo.data.golds import within_reach
from scsdpo.data.rendered import Rendered, rendered, too_long, warn_dropped
from scsdpo.errors import ConfigurationError, blamed_on
from scsdpo.policy.chat import Chat
from scsdpo.types import Prompt, stable_hash

FILTER_AHEAD = 20_000
"""Sources of up to this many prompts are filtered before training, larger ones while training."""
_TRIES = 1_000


class ShuffledSource(ABC):
    """Number -> prompt: pass after pass over a source, each in a new order.

    A number has the same prompt each time and in every process, so a run's position in a source is
    just a number.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of prompts of a pass; nominal if it is not known before."""

    @abstractmethod
    def __getitem__(self, number: int) -> Prompt:
        """The rendered prompt with this number, counted from 0 over all passes."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest prompt; if unknown, the limit on them."""

    def key(self, number: int) -> str:
        """Key of the prompt at `number`."""
        return self[number].key

    @abstractmethod
    def mark(self, count: int) -> str:
        """A hash of the questions and their order; of a stream, of its first `count` questions.

        If it is unchanged, the prompt at `count` is the next one, as before.
        """

    def question_keys(self) -> Iterator[str]:
        """Keys of the first prompts of the first pass, at most `FILTER_AHEAD`."""
        return (self[number].key for number in range(min(len(self), FILTER_AHEAD)))

    @staticmethod
    def of(source: Source, chat: Chat, max_tokens: int, seed: int) -> "ShuffledSource":
        """The subclass that fits the source's size and kind."""
        if source.sequential or len(source) > FILTER_AHEAD:
            return _Streamed(source, chat, max_tokens, seed)
        return _Permuted(Rendered(source, source.name, chat, max_tokens), seed)


class _Permuted(ShuffledSource):
    """Each pass is a permutation of all prompts: for sources that are filtered before training."""

    def __init__(self, prompts: Rendered, seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        return self.prompts.longest

    def __getitem__(self, number: int) -> Prompt:
        return self.prompts[self._place(number)]

    def key(self, number: int) -> str:
        return self.prompts.key(self._place(number))

    def mark(self, count: int) -> str:
        return self._mark

    @cached_property
    def _mark(self) -> str:
        return f"{stable_hash(self.seed, *map(self.prompts.key, range(len(self)))):016x}"

    def _place(self, number: int) -> int:
        passes, place = divmod(number, len(self))
        return _permutation(stable_hash(self.seed, passes), len(self))[place]


@lru_cache(16)
def _permutation(seed: int, size: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


class _Streamed(ShuffledSource):
    """Reads prompts as they come and skips those that are too long; each once a pass.

    Numbers must be asked in rising order; for a lower one, reading starts again.
    """

    def __init__(self, source: Source, chat: Chat, max_tokens: int, seed: int) -> None:
        self.source, self.chat, self.max_tokens, self.seed = source, chat, max_tokens, seed
        self._prompts: Iterator[Prompt] = iter(())
        self._at = -1
        self._read = 0
        self._process = 0
        # Read one prompt now, so that a fault of the source is reported before training.
        if next(self._fitting(stable_hash(seed, 0), log=False), None) is None:
            raise ValueError(f"{source.name!r} has no prompts; check where they come from")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def longest(self) -> int:
        return self.max_tokens

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prompts": iter(()), "_at": -1}

    def __getitem__(self, number: int) -> Prompt:
        # A forked process shares the position in an open file, so it must read anew.
        if number <= self._at or self._at < 0 or self._process != os.getpid():
            self._prompts, self._at = self._endless(), -1
            self._read, self._process = self.seed, os.getpid()
        ahead, self._at = number - self._at, -1  # after an error, reading starts again
        for prompt in itertools.islice(self._prompts, ahead):
            self._read = stable_hash(self._read, prompt.key)
        self._at = number
        return prompt

    def mark(self, count: int) -> str:
        if count == 0:
            return f"{self.seed:016x}"
        if self._at != count - 1 or self._process != os.getpid():
            self[count - 1]
        return f"{self._read:016x}"

    def _endless(self) -> Iterator[Prompt]:
        for passes in itertools.count():
            yield from self._fitting(stable_hash(self.seed, passes), log=True)

    def _fitting(self, seed: int, *, log: bool) -> Iterator[Prompt]:
        dropped = in_a_row = read = 0
        asked = within_reach(self.source, self.source.shuffled(seed), log=log)
        for read, prompt in enumerate(asked, start=1):
            prompt = rendered(prompt, self.chat)
            if len(prompt.ids) <= self.max_tokens:
                in_a_row = 0
                yield prompt
                continue
            dropped, in_a_row = dropped + 1, in_a_row + 1
            if in_a_row == _TRIES:
                name = self.source.name
                raise ValueError(too_long(name, _TRIES, len(prompt.ids), self.max_tokens))
            if log and dropped.bit_count() == 1:  # 1, 2, 4, 8, ...
                warn_dropped(self.source.name, dropped, read, self.max_tokens)
        if read and dropped == read:
            raise ValueError(too_long(self.source.name, read, len(prompt.ids), self.max_tokens))


Draws = tuple[tuple[int, int], ...]
"""(source, number in it) of each question of a batch, over all ranks."""


class PromptBatch:
    """The questions of a step, as a loader gives them to the data module.

    It is no sequence: Lightning's precision plugins would rebuild every prompt to find tensors.

    Args:
        prompts: the questions, or the error that prevents them.
        draws: draws of the whole batch; empty in evaluation.
        marks: `ShuffledSource.mark` after the batch, of each source in it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | ConfigurationError,
        draws: Draws = (),
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self.fault = prompts if isinstance(prompts, ConfigurationError) else None
        self.prompts = () if isinstance(prompts, ConfigurationError) else tuple(prompts)
        self.draws, self.marks = draws, marks or {}
        self.upcoming: tuple[PromptBatch, ...] = ()
        """The next batches, as many as `TaskDataModule.ahead` says."""

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)


class Mixture(Dataset[Prompt]):
    """Several shuffled sources, indexed by (source, number in it); errors name the source's key."""

    def __init__(self, sources: Sequence[ShuffledSource]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, draw: tuple[int, int]) -> Prompt:
        source, number = draw
        with self.blamed(source):
            return self.sources[source][number]

    def __getitems__(self, asked: Sequence[tuple[Draws, int]]) -> PromptBatch:
        """A rank's share of a batch, from the batch's draws and the rank's indices into them.

        Copies of a question are numbered over the whole batch. An error of a source is returned in
        the batch: raised in a worker process, it would arrive as the text of a traceback.
        """
        (draws, _), *_ = asked
        mine = {place for _, place in asked}
        before: Counter[str] = Counter()
        prompts = []
        try:
            for place, (source, number) in enumerate(draws):
                if place in mine:
                    prompt = self[source, number]
                    prompts.append(replace(prompt, copy=before[prompt.key]))
                    before[prompt.key] += 1
                else:
                    with self.blamed(source):
                        before[self.sources[source].key(number)] += 1
            counts = {source: number + 1 for source, number in draws}
            marks = {source: self.sources[source].mark(count) for source, count in counts.items()}
            return PromptBatch(prompts, draws, marks)
        except ConfigurationError as error:
            return PromptBatch(error)

    def question_keys(self) -> Iterator[str]:
        """Keys of each source's first prompts."""
        for number, source in enumerate(self.sources):
            with self.blamed(number):
                yield from source.question_keys()

    def blamed(self, source: int) -> AbstractContextManager[None]:
        """Name a source's key in errors inside the block."""
        return blamed_on(source_key("train", source, len(self.sources)))


def interleave(weights: Sequence[int], start: int = 0) -> Iterator[tuple[int, int]]:
    """Endless draws (which source, number in it), from draw `start` on.

    The next draw is of the source that is furthest behind its share. So every stretch of draws has
    the proportions of the weights to within about one question, and sum(weights) draws contain each
    source exactly weight times.

    Args:
        weights: one a source; > 0.
        start: number of draws to skip.
    """
    period = sum(weights)
    passes, start = divmod(start, period)
    counts = [passes * weight for weight in weights]
    credit = [0] * len(weights)
    for draw in itertools.count():
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        chosen = max(range(len(weights)), key=lambda source: (credit[source], -source))
        credit[chosen] -= period
        if draw >= start:
            yield chosen, counts[chosen]
        counts[chosen] += 1
