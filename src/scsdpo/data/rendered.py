"""Render prompts to token ids, and drop those that are too long."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import Dataset, get_worker_info

from scsdpo.data._base import Source
from scsdpo.policy.chat import Chat
from scsdpo.thinking import left_open
from scsdpo.types import Prompt

_warn = rank_zero_only(logging.getLogger(__name__).warning)


class Rendered(Dataset[Prompt]):
    """Prompts with their `ids`, in order, without those longer than a limit.

    Args:
        prompts: by index.
        name: of their source.
        chat: renders them.
        max_tokens: limit on a rendered prompt, generation header included.

    Raises:
        ValueError: if every prompt is too long.
    """

    def __init__(
        self, prompts: Sequence[Prompt] | Source, name: str, chat: Chat, max_tokens: int
    ) -> None:
        self.prompts, self.chat = prompts, chat
        # By index: iterating a source may not stop at its length.
        asked = (prompts[index] for index in range(len(prompts)))
        lengths = [len(chat.render(prompt.messages, prompt.tools)) for prompt in asked]
        self.longest = max((length for length in lengths if length <= max_tokens), default=0)
        self.kept = [index for index, length in enumerate(lengths) if length <= max_tokens]
        if not self.kept:
            raise ValueError(too_long(name, len(lengths), min(lengths, default=0), max_tokens))
        warn_dropped(name, len(lengths) - len(self.kept), len(lengths), max_tokens)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return rendered(self.prompts[self.kept[index]], self.chat)

    def key(self, index: int) -> str:
        """Key of the prompt at `index`, without rendering it."""
        return self.prompts[self.kept[index]].key


def rendered(prompt: Prompt, chat: Chat) -> Prompt:
    """The prompt with `ids`, the thinking tag that they leave open, and the response template."""
    return replace(
        prompt,
        ids=chat.render(prompt.messages, prompt.tools),
        response_template=chat.tokenizer.response_template or {},
        thinking=left_open(chat.header(prompt.messages, prompt.tools)),
    )


def too_long(name: str, count: int, length: int, limit: int) -> str:
    """Error message for `count` consecutive prompts over the limit."""
    return (
        f"raise data.max_prompt_tokens, which is {limit}: {count} prompts of {name!r} in a row are "
        f"longer, one with {length} tokens"
    )


def warn_dropped(name: str, dropped: int, size: int, limit: int) -> None:
    """Log how many prompts were dropped, in one process only."""
    worker = get_worker_info()
    if dropped and (worker is None or worker.id == 0):
        _warn(
            "%s: %d of %d prompts are longer than max_prompt_tokens=%d and were dropped",
            *(name, dropped, size, limit),
        )
