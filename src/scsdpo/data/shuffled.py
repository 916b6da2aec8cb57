"""The order in which the questions of each training source are asked, without end."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
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
"""Sources of up to this many prompts are filtered before training, larger ones as they go."""
_TRIES = 1_000


class ShuffledSource(ABC):
    """Number -> prompt: pass after pass over a source, each in an order of its own.

    The prompt at a number is the same each time and in every process, so that a place in a run is
    a number and nothing else.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Prompts of a pass, nominal if that is not known before."""

    @abstractmethod
    def __getitem__(self, number: int) -> Prompt:
        """The rendered prompt that is asked as `number`, from 0."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest prompt; where they are not known before, the limit on them."""

    def question_keys(self) -> Iterator[str]:
        """Keys of the first pass's prompts, at most `FILTER_AHEAD`."""
        return (self[number].key for number in range(min(len(self), FILTER_AHEAD)))

    @staticmethod
    def of(source: Source, chat: Chat, max_tokens: int, seed: int) -> "ShuffledSource":
        """The form that fits the source's size and kind."""
        if source.sequential or len(source) > FILTER_AHEAD:
            return _Streamed(source, chat, max_tokens, seed)
        return _Permuted(Rendered(source, source.name, chat, max_tokens), seed)


class _Permuted(ShuffledSource):
    """A permutation a pass, each prompt once: for sources that are filtered before training."""

    def __init__(self, prompts: Rendered, seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        return self.prompts.longest

    def __getitem__(self, number: int) -> Prompt:
        passes, place = divmod(number, len(self))
        return self.prompts[_permutation(stable_hash(self.seed, passes), len(self))[place]]


@lru_cache(16)
def _permutation(seed: int, size: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


class _Streamed(ShuffledSource):
    """Prompts as they come, too long ones left out on the way; each once a pass.

    Numbers are asked in rising order; for a lower one than before, reading starts again.
    """

    def __init__(self, source: Source, chat: Chat, max_tokens: int, seed: int) -> None:
        self.source, self.chat, self.max_tokens, self.seed = source, chat, max_tokens, seed
        self._prompts: Iterator[Prompt] = iter(())
        self._at = -1
        # Whatever is wrong with the source is said before training starts.
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
        if number <= self._at or self._at < 0:
            self._prompts, self._at = self._endless(), -1
        ahead, self._at = number - self._at - 1, -1  # after an error, reading starts again
        prompt = next(itertools.islice(self._prompts, ahead, None))
        self._at = number
        return prompt

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
            if log and dropped.bit_count() == 1:  # 1, 2, 4, 8, ...: not a line for each
                warn_dropped(self.source.name, dropped, read, self.max_tokens)
        if read and dropped == read:
            raise ValueError(too_long(self.source.name, read, len(prompt.ids), self.max_tokens))


class Mixture(Dataset[Prompt]):
    """Several shuffled sources, by (which one, number in it); what is wrong names the source."""

    def __init__(self, sources: Sequence[ShuffledSource]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, draw: tuple[int, int]) -> Prompt:
        source, number = draw
        with self._blamed(source):
            return self.sources[source][number]

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[Prompt] | ConfigurationError:
        """The prompts of a batch, or what is wrong with a source.

        Not raised: what a worker process raises comes out of it as the text of a traceback.
        """
        try:
            return [self[draw] for draw in draws]
        except ConfigurationError as error:
            return error

    def question_keys(self) -> Iterator[str]:
        """Keys of each source's first prompts."""
        for number, source in enumerate(self.sources):
            with self._blamed(number):
                yield from source.question_keys()

    def _blamed(self, source: int) -> AbstractContextManager[None]:
        return blamed_on(source_key("train", source, len(self.sources)))


def interleave(weights: Sequence[int], start: int = 0) -> Iterator[tuple[int, int]]:
    """Endless draws (which source, number in it), from draw `start` on.

    Of the sources, the one comes next that is furthest behind its share. So each stretch of draws
    has the proportions of the weights, to within a question or so, and sum(weights) draws have
    each source exactly as often as its weight says.

    Args:
        weights: one a source; > 0.
        start: draws to leave out.
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
