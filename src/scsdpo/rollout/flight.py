"""Continuous batching: which responses are being drawn, and when others take their place."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError
from scsdpo.loss.logits import TokenLogits
from scsdpo.policy.attention import run_decoder
from scsdpo.rollout.shared_prefix import Decode, Prefill, PrefixCache
from scsdpo.rollout.tape import Tape

_PREFILL_TOKENS = 8192
"""Most tokens (padding included) of one prompt pass; bounds its activations."""
_STEPS_BETWEEN_RETIRING = 2
"""Finished responses leave every so many steps; on a GPU the host waits for the device there."""
_FREE_TO_ADMIT = 0.25
"""Share of the response slots that must be free before waiting prompts are run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A distinct prompt and all responses to it."""

    ids: tuple[int, ...]
    rows: list[int]
    """Its responses' rows of the tape."""


class Flight:
    """The responses being drawn. Slot r of the cache belongs to entry r of each [R] tensor.

    Args:
        model: in eval mode, attending by layouts.
        tape: decides and keeps the draws.
        cache: its slots bound how much is in flight.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape, cache: PrefixCache) -> None:
        self.model = model
        self.tape = tape
        self.cache = cache
        none = tape.ids.new_zeros(0)
        self.row = none
        """[R] row of the tape."""
        self.drawn = none
        """[R] tokens drawn so far."""
        self.ended = none.bool()
        """[R] an end of sequence was drawn."""
        self.prompt = none
        """[R] prompt slot."""
        self.prompt_lengths = none
        """[P]."""
        self.oldest = 0
        """Most tokens drawn of any response in flight."""
        self.layout: Decode | None = None
        """Made anew when responses came or left."""

    def run(self, groups: Sequence[Group]) -> None:
        """Draw all responses of `groups`, which come in the order of falling prompt length."""
        waiting = deque(groups)
        hidden: list[Tensor] = []
        step = 0
        while waiting or len(self.row):
            interrupt.check()
            if self._is_worth_admitting():
                while chunk := self._next(waiting):
                    hidden.append(self._admit(chunk))
            ids = self._draw(torch.cat(hidden))
            step += 1
            if step % _STEPS_BETWEEN_RETIRING == 0 or self.oldest == self.tape.ids.shape[1]:
                ids = ids[self._retire()]
            hidden = [self._decode(ids)] if len(ids) else []

    def _is_worth_admitting(self) -> bool:
        """A pass of few prompts costs nearly what one of many does: wait for some free slots."""
        slots, _ = self.cache.row_shape
        return len(self.row) <= slots * (1 - _FREE_TO_ADMIT)

    def _next(self, waiting: deque[Group]) -> list[Group]:
        """Take from `waiting` what has room now and fits one prompt pass."""
        slots, _ = self.cache.prompt_shape
        free_prompts = slots - len(self.prompt_lengths)
        slots, _ = self.cache.row_shape
        free_rows = slots - len(self.row)
        chunk: list[Group] = []
        while waiting and len(chunk) < free_prompts and len(waiting[0].rows) <= free_rows:
            if chunk and (len(chunk) + 1) * len(chunk[0].ids) > _PREFILL_TOKENS:
                break
            chunk.append(waiting.popleft())
            free_rows -= len(chunk[-1].rows)
        return chunk

    def _admit(self, groups: list[Group]) -> Tensor:
        """Run the prompts of `groups`; [r, D], what predicts the first token of each response."""
        device = self.row.device
        width = len(groups[0].ids)
        ids = torch.tensor([[*g.ids, *[0] * (width - len(g.ids))] for g in groups], device=device)
        positions = torch.arange(width, device=device).expand(len(groups), -1)
        first = len(self.prompt_lengths)
        prefill = Prefill(self.cache, first)
        hidden = run_decoder(self.model, prefill, input_ids=ids, position_ids=positions)
        _refuse_other_layers(self.model, self.cache)
        lengths = torch.tensor([len(g.ids) for g in groups], device=device)
        sizes = torch.tensor([len(g.rows) for g in groups], device=device)
        rows = torch.tensor([row for g in groups for row in g.rows], device=device)
        at = torch.arange(len(groups), device=device)
        self.row = torch.cat([self.row, rows])
        self.drawn = torch.cat([self.drawn, torch.zeros_like(rows)])
        self.ended = torch.cat([self.ended, torch.zeros_like(rows, dtype=torch.bool)])
        self.prompt = torch.cat([self.prompt, first + at.repeat_interleave(sizes)])
        self.prompt_lengths = torch.cat([self.prompt_lengths, lengths])
        self.layout = None
        return hidden[at, lengths - 1].repeat_interleave(sizes, dim=0)

    def _draw(self, hidden: Tensor) -> Tensor:
        """[R]: the next token of each response."""
        head = self.model.get_output_embeddings()
        logits = TokenLogits.of(hidden, head, self.tape.sampling.temperature).logits
        ids = self.tape.draw(logits, self.row, self.drawn)
        self.ended |= self.tape.is_end(ids)
        self.drawn += 1
        self.oldest += 1
        return ids

    def _retire(self) -> Tensor:
        """Let finished responses go, and prompts that no response follows any more.

        Holes are filled with the last ones, so that slots stay contiguous and little is copied.
        Returns the [R'] old slots of those that stay.
        """
        self.ended |= self.tape.is_stopped(self.row, self.drawn)
        order, holes = _fill(~self.ended & (self.drawn < self.tape.ids.shape[1]))
        if len(order) == len(self.row):
            return order
        self.cache.move_rows(holes, order[holes], self.oldest)
        self.row, self.drawn, self.ended = self.row[order], self.drawn[order], self.ended[order]
        self.oldest = int(self.drawn.max()) if len(order) else 0
        self._retire_prompts(self.prompt[order])
        self.layout = None
        return order

    def _retire_prompts(self, prompt: Tensor) -> None:
        order, holes = _fill(prompt.bincount(minlength=len(self.prompt_lengths)) > 0)
        self.cache.move_prompts(holes, order[holes])
        slot = torch.empty_like(self.prompt_lengths)
        slot[order] = torch.arange(len(order), device=order.device)
        self.prompt, self.prompt_lengths = slot[prompt], self.prompt_lengths[order]

    def _decode(self, ids: Tensor) -> Tensor:
        """Run one token of each response; [R, D], what predicts the next."""
        if self.layout is None:
            self.layout = Decode(self.cache, self.prompt, self.prompt_lengths)
        places = self.drawn - 1
        self.layout.at(places, self.oldest)
        positions = self.layout.starts + places
        return run_decoder(
            self.model, self.layout, input_ids=ids[:, None], position_ids=positions[:, None]
        )[:, 0]


def _fill(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where everyone sits once the last kept entries fill the holes among the first.

    Returns the old index of each kept entry in its new place, and the places that changed hands.
    """
    n = int(keep.sum())
    order = torch.arange(n, device=keep.device)
    holes = (~keep[:n]).nonzero()[:, 0]
    order[holes] = keep[n:].nonzero()[:, 0] + n
    return order, holes


def _refuse_other_layers(model: PreTrainedModel, cache: PrefixCache) -> None:
    """Every layer must have come through our attention; some keep another kind of state."""
    layers = model.config.get_text_config().num_hidden_layers
    if len(cache.layers) != layers:
        raise ConfigurationError(
            f"model.rollout: HFRollout stores keys and values only, and "
            f"{layers - len(cache.layers)} of the {layers} layers of {type(model).__name__} have "
            "none of transformers' attention interface: use VLLMRollout"
        )
