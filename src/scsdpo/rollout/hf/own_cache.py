"""Drawing responses with the model's own cache, where prompts cannot be shared.

Rows of equal length run together and grow together, so that no row is ever padded: right for any
cache, recurrent states included, that transformers can generate with.
"""

from collections.abc import Iterator, Mapping, Sequence

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
        """Draw all responses of `groups`; of episodes turn by turn, and each turn runs what stands
        before it.
        """
        prompts = {row: group.ids for group in groups for row in group.rows}
        dialogue = self.buffer.dialogue
        todo = dict(prompts)
        while todo:
            for batch in self._batches(todo):
                self._draw(batch, {row: len(todo[row]) - len(prompts[row]) for row in batch})
            for row in todo:
                if dialogue.plays(row):
                    self.buffer.respond(
                        row, self.buffer.used(row), ended=self.buffer.has_ended(row)
                    )
            todo = {}
            while dialogue.due:
                interrupt.check()
                for row, ids in dialogue.answers(wait=True):
                    if ids:
                        self.buffer.extend(row, used := self.buffer.used(row), ids)
                        so_far = self.buffer.ids[row, : used + len(ids)].tolist()
                        todo[row] = (*prompts[row], *so_far)

    def _batches(self, todo: Mapping[int, Sequence[int]]) -> Iterator[dict[int, Sequence[int]]]:
        """Rows with equally many ids before them, as many as fit."""
        batch: dict[int, Sequence[int]] = {}
        for row, ids in sorted(todo.items(), key=lambda one: -len(one[1])):
            longest = len(ids) + self.buffer.ids.shape[1]
            most = max(min(self.max_rows, self.max_tokens // longest), 1)
            other = batch and len(next(iter(batch.values()))) != len(ids)
            if other or len(batch) >= most:
                yield batch
                batch = {}
            batch[row] = ids
        if batch:
            yield batch

    def _draw(self, batch: Mapping[int, Sequence[int]], used: Mapping[int, int]) -> None:
        device, places = self.buffer.ids.device, self.buffer.ids.shape[1]
        ids = torch.tensor(list(batch.values()), device=device)
        rows = torch.tensor(list(batch), device=device)
        before = ids.shape[1] - torch.tensor([used[row] for row in batch], device=device)
        pad = self.buffer.chat.pad_id
        draws = _Draws(self.buffer, rows, before)
        self.model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=places - min(used[row] for row in batch),
                do_sample=False,
                use_cache=self.reads_back,
                pad_token_id=pad,
                eos_token_id=None,
            ),
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList([_Ends(self.buffer, rows, before)]),
        )


class _Draws(LogitsProcessor):
    """Draws a token of each row, and leaves it the only one there is."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor, prompts: Tensor) -> None:
        self.buffer, self.rows, self.prompts = buffer, rows, prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        interrupt.check()
        places = input_ids.shape[1] - self.prompts
        only = torch.full_like(scores, -torch.inf)
        if bool((places >= self.buffer.ids.shape[1]).all()):  # transformers may run past the end
            only[:, self.buffer.chat.pad_id] = 0
            return only
        temperature = self.buffer.sampling.temperature
        # Nothing is drawn of rows that have ended; transformers pads them.
        drawn = self.buffer.draw(scores / temperature, self.rows, places).clamp(min=0)
        return only.scatter_(1, drawn[:, None], 0)


class _Ends(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor, prompts: Tensor) -> None:
        self.buffer, self.rows, self.prompts = buffer, rows, prompts

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: object) -> Tensor:
        lengths = input_ids.shape[1] - self.prompts
        ended = self.buffer.has_end(self.rows) | self.buffer.is_stopped(self.rows, lengths)
        if self.buffer.dialogue.is_played:  # what follows is not drawn any more
            full = lengths >= self.buffer.ids.shape[1]
            self.buffer.waits[self.rows] |= ended | full
            ended |= self.buffer.waits[self.rows]
        return ended
