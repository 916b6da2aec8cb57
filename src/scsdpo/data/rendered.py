"""Prompts as token ids, and the limit on their length."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import Dataset

from scsdpo.data._base import Source
from scsdpo.policy.chat import Chat
from scsdpo.types import Prompt

FILTER_AHEAD = 20_000
"""Sources of up to this many prompts are filtered before training, larger ones as they go."""
_TRIES = 100

_log = logging.getLogger(__name__)


class Rendered(Dataset[Prompt]):
    """The prompts of a source with their `ids`, those longer than a limit left out.

    Of a large or endless source nothing is looked at ahead: there, a prompt that is too long gives
    way to the next one that is not, the same each time, so that the position stays restorable.

    Args:
        source: where the prompts come from.
        chat: renders them.
        max_tokens: limit on a rendered prompt, generation header included.

    Raises:
        ValueError: if every prompt is too long.
    """

    def __init__(self, source: Source, chat: Chat, max_tokens: int) -> None:
        self.source, self.chat, self.max_tokens = source, chat, max_tokens
        size = len(source)
        self.kept = self._fitting(size) if size <= FILTER_AHEAD else range(size)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(_TRIES):
            prompt = self._render(self.kept[(index + offset) % len(self)])
            if len(prompt.ids) <= self.max_tokens:
                return prompt
        raise ValueError(self._too_long(_TRIES, len(prompt.ids)))

    def _render(self, index: int) -> Prompt:
        prompt = self.source[index]
        return replace(prompt, ids=self.chat.render(prompt.messages))

    def _fitting(self, size: int) -> Sequence[int]:
        lengths = [len(self._render(index).ids) for index in range(size)]
        kept = [index for index, length in enumerate(lengths) if length <= self.max_tokens]
        if not kept:
            raise ValueError(self._too_long(size, min(lengths, default=0)))
        if len(kept) < size:
            _warn_dropped(self.source.name, size - len(kept), size, self.max_tokens)
        return kept

    def _too_long(self, count: int, length: int) -> str:
        return (
            f"`TaskDataModule(max_prompt_tokens={self.max_tokens})`: {count} prompts of "
            f"{self.source.name!r} in a row are longer, one with {length} tokens; raise the limit"
        )


@rank_zero_only
def _warn_dropped(name: str, dropped: int, size: int, limit: int) -> None:
    _log.warning(
        "%s: %d of %d prompts are longer than max_prompt_tokens=%d and were dropped",
        *(name, dropped, size, limit),
    )
