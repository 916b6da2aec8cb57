"""Between chat messages and token ids, in one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from scsdpo.types import Message


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer with its chat template and end-of-sequence ids.

    Args:
        tokenizer: must have a chat template.
        eos_ids: every id that ends a response; several are common (`<|im_end|>`, `<|endoftext|>`).
        template_kwargs: passed to the chat template, e.g. `enable_thinking: false`.

    Raises:
        ValueError: if the tokenizer has no chat template, or there is no end-of-sequence id.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {name!r} has no chat template; use an instruction-tuned "
                "checkpoint, or add a `chat_template.jinja` to its folder"
            )
        if not self.eos_ids:
            raise ValueError(
                f"neither the tokenizer nor the generation config of {name!r} names an "
                "end-of-sequence token; set `eos_token_id` in its generation_config.json"
            )

    @property
    def pad_id(self) -> int:
        """Fills the places that masks leave out; which id it is changes no number."""
        pad = self.tokenizer.pad_token_id
        return self.eos_ids[0] if pad is None else pad

    @cached_property
    def _silent(self) -> frozenset[int | None]:
        """Tokens without text."""
        own = self.tokenizer
        return frozenset({*self.eos_ids, own.bos_token_id, own.eos_token_id, own.pad_token_id})

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation, with the header that opens the assistant's turn."""
        return tuple(
            self.tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self.template_kwargs,
            )
        )

    def header(self, messages: Sequence[Message]) -> str:
        """What opens the assistant's turn: text that the template adds when asked for it."""
        opened, closed = (
            self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=asked, tokenize=False, **self.template_kwargs
            )
            for asked in (True, False)
        )
        if opened.startswith(closed):
            return opened[len(closed) :]
        return opened.rpartition(messages[-1]["content"].strip() or opened)[2]

    def encode(self, text: str) -> list[int]:
        """Ids of bare text, no special tokens added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Text of a response without beginnings, ends and padding; ids beyond the tokenizer give
        nothing. Other special tokens stay, such as <think> and <tool_call>: they say something.
        """
        said = [i for i in map(int, ids) if i < len(self.tokenizer) and i not in self._silent]
        return self.tokenizer.decode(said, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A piece of text for each id; together they are all of it, special tokens included.

        Where several tokens make one character the last of them has it, and the others ''.
        """
        pieces, start, said = [], 0, 0
        for end in range(1, len(ids) + 1):
            # From a token before, for some tokenizers drop a leading space.
            before, text = self._whole(ids[start:said]), self._whole(ids[start:end])
            # A character has four bytes at most: what is not one by then never will be.
            whole = not text.endswith("\ufffd") or end == len(ids) or end - said >= 4
            pieces.append(text[len(before) :] if whole else "")
            if whole:
                start, said = said, end
        return pieces

    def _whole(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < len(self.tokenizer)]
        return self.tokenizer.decode(
            known, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
