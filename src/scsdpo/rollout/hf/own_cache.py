"""Drawing responses with transformers' own cache, for models whose prompts cannot be shared.

Rows of equal length run together, so no row is ever padded. This is right for every cache that
transformers can generate with, recurrent states included.
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
    """Draws responses by transformers' `generate`; a prompt runs once for each response.

    Args:
        model: in eval mode.
        buffer: chooses and keeps the tokens.
        max_tokens: most tokens of the rows in flight, with those that they may still draw.
        max_rows: most rows in flight.
        reads_back: use a cache. False: the whole row runs again for every token, which is slow but
            right if rotary frequencies depend on a row's length.
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
        """Draw all responses of `groups`.

        Episodes are drawn turn by turn, and each turn runs all tokens before it again.
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
        """Batches of rows with equally many ids before them, as large as fits."""
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
        draws = _Draws(self.buffer, rows, before)
        settings = GenerationConfig(
            max_new_tokens=places - min(used[row] for row in batch),
            do_sample=False,
            use_cache=self.reads_back,
            pad_token_id=self.buffer.chat.pad_id,
        )
        # The checkpoint's own settings, such as a repetition penalty, must not apply.
        own, self.model.generation_config = self.model.generation_config, settings
        try:
            self.model.generate(
                inputs=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([draws]),
                stopping_criteria=StoppingCriteriaList([_Ends(self.buffer, rows, before)]),
            )
        finally:
            self.model.generation_config = own


class _Draws(LogitsProcessor):
    """Draws a token for each row, and sets all other scores to -inf."""

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
        # Rows that have ended draw nothing; transformers pads them.
        drawn = self.buffer.draw(scores / temperature, self.rows, places).clamp(min=0)
        return only.scatter_(1, drawn[:, None], 0)


class _Ends(StoppingCriteria):
    """Tells transformers which rows have ended."""

    def __init__(self, buffer: ResponseBuffer, rows: Tensor, prompts: Tensor) -> None:
        self.buffer, self.rows, self.prompts = buffer, rows, prompts

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: object) -> Tensor:
        lengths = input_ids.shape[1] - self.prompts
        ended = self.buffer.has_end(self.rows) | self.buffer.is_stopped(self.rows, lengths)
        if self.buffer.dialogue.is_played:  # later tokens must not be kept
            full = lengths >= self.buffer.ids.shape[1]
            self.buffer.waits[self.rows] |= ended | full
            ended |= self.buffer.waits[self.rows]
        return ended
