"""Drawing responses with the model's own cache, where prompts cannot be shared.

Rows of equal length run together and grow together, so that no row is ever padded: right for any
cache, recurrent states included, that transformers can generate with.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from scsdpo import interrupt
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.rollout.hf.scheduler import Group


class OwnCache:
    """Draws responses by transformers' `generate`, each prompt run once a response.

    Args:
        model: in eval mode.
        buffer: decides and keeps the draws.
        max_tokens: of the rows in flight, those that they may still draw included.
        max_rows: most rows in flight.
        reads_back: keep a cache. Otherwise the whole row runs again for every token, which is right
            where frequencies depend on a row's length, and slow.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        buffer: ResponseBuffer,
        *,
        max_tokens: int,
        max_rows: int,
        reads_back: bool,
    ) -> None:
        self.model, self.buffer = model, buffer
        self.max_tokens, self.max_rows, self.reads_back = max_tokens, max_rows, reads_back

    def run(self, groups: Sequence[Group]) -> None:
        """Draw all responses of `groups`."""
        for batch in self._batches(groups):
            self._draw(batch)

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[tuple[Group, int]]]:
        """Rows with prompts of one length, as many as fit."""
        batch: list[tuple[Group, int]] = []
        for group in sorted(groups, key=lambda group: -len(group.ids)):
            longest = len(group.ids) + self.buffer.ids.shape[1]
            most = max(min(self.max_rows, self.max_tokens // longest), 1)
            for row in group.rows:
                other = batch and len(batch[0][0].ids) != len(group.ids)
                if other or len(batch) >= most:
                    yield batch
                    batch = []
                batch.append((group, row))
        if batch:
            yield batch

    def _draw(self, batch: Sequence[tuple[Group, int]]) -> None:
        device, places = self.buffer.ids.device, self.buffer.ids.shape[1]
        ids = torch.tensor([group.ids for group, _ in batch], device=device)
        rows = torch.tensor([row for _, row in batch], device=device)
        pad = self.buffer.chat.pad_id
        draws = _Draws(self.buffer, rows, ids.shape[1])
        self.model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=places,
                do_sample=False,
                use_cache=self.reads_back,
                pad_token_id=pad,
                eos_token_id=None,
            ),
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList([_Ends(self.buffer, rows, ids.shape[1])]),
        )


class _Draws(LogitsProcessor):
    """Draws a token of each row, and leaves it the only one there is."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor, prompt: int) -> None:
        self.buffer, self.rows, self.prompt = buffer, rows, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        interrupt.check()
        place = input_ids.shape[1] - self.prompt
        only = torch.full_like(scores, -torch.inf)
        if place >= self.buffer.ids.shape[1]:  # transformers may run past the end
            only[:, self.buffer.chat.pad_id] = 0
            return only
        temperature = self.buffer.sampling.temperature
        places = torch.full_like(self.rows, place)
        drawn = self.buffer.draw(scores / temperature, self.rows, places)
        return only.scatter_(1, drawn[:, None], 0)


class _Ends(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor, prompt: int) -> None:
        self.buffer, self.rows, self.prompt = buffer, rows, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: object) -> Tensor:
        drawn = self.buffer.ids[self.rows]
        ended = self.buffer.is_end(drawn).any(-1)
        lengths = torch.full_like(self.rows, input_ids.shape[1] - self.prompt)
        return ended | self.buffer.is_stopped(self.rows, lengths)
