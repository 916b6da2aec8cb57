"""The random numbers and the drawn tokens of a batch of responses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from scsdpo.policy import Chat
from scsdpo.rollout.dialogue import Dialogue
from scsdpo.rollout.hf.draw import draw, uniforms
from scsdpo.types import Responses, Sampling

T = TypeVar("T")

_SLACK = 8
"""More tokens to decode before a search for stop strings, because some tokens have no text."""
_UNDRAWN = -1
"""Id at places where no token was drawn; no vocabulary has it."""


class ResponseBuffer:
    """A table with one row for each response and one place for each token.

    Args:
        dialogue: the Q questions and their environments; response i to question q is row q G + i.
        sampling: the distribution; `max_new_tokens` is the number of places.
        chat: knows the ids that end a response.
        device: device of the tables.
    """

    def __init__(
        self, dialogue: Dialogue, sampling: Sampling, chat: Chat, device: torch.device
    ) -> None:
        self.dialogue = dialogue
        self.prompts = prompts = dialogue.prompts
        self.sampling = sampling
        self.chat = chat
        self.ends = torch.tensor(chat.eos_ids, device=device)
        self.stops = [sampling.stops(p) for p in prompts for _ in range(sampling.n)]
        self.uniforms = uniforms(prompts, sampling).to(device)
        self.ids = torch.full(self.uniforms.shape, _UNDRAWN, device=device)
        self.sampling_logprobs = torch.zeros(self.ids.shape, device=device)
        self.policy_logprobs = torch.zeros(self.ids.shape, device=device)
        self.experts = self.ids.new_zeros((*self.ids.shape, 0, 0), dtype=torch.int16)
        """[Q G, L, layers, k] experts where each token is predicted; layers is 0 before the first
        record."""
        self.searched = [0] * len(self.stops)
        """[Q G] number of tokens of each response that were searched for stop strings."""
        self.stopped = torch.full((len(self.stops),), self.ids.shape[1] + 1, device=device)
        """[Q G] number of tokens at which a stop string was complete; places + 1: none yet."""
        self.given = torch.zeros_like(self.ids, dtype=torch.bool)
        """[Q G, places]: True where an environment wrote the token."""
        self.turns = torch.zeros_like(self.ids, dtype=torch.int32)
        """[Q G, places] number of the turn of each token."""
        self.turn_starts = torch.zeros_like(self.stopped)
        """[Q G] place at which the current turn begins."""
        self.waits = torch.zeros_like(self.stopped, dtype=torch.bool)
        """[Q G]: True while the environment has not answered and no token is drawn."""

    def draw(self, logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Draw and keep the token [R] at place `places` [R] of each of `rows` [R].

        Args:
            logits: [R, V], divided by the temperature.
            rows: rows of the responses.
            places: place of the next token of each.
        """
        places = places.clamp(max=self.ids.shape[1] - 1)  # full rows may wait for a verdict
        drawn = draw(logits, self.uniforms[rows, places], self.sampling)
        tables = (self.ids, self.sampling_logprobs, self.policy_logprobs)
        new = [drawn.ids, drawn.sampling_logprobs.float(), drawn.policy_logprobs.float()]
        if self.dialogue.is_played:
            kept = self.keeps(rows, places)
            new = [torch.where(kept, t[rows, places], n) for t, n in zip(tables, new, strict=True)]
        for table, each in zip(tables, new, strict=True):
            table[rows, places] = each
        return new[0]

    def keeps(self, rows: Tensor, places: Tensor) -> Tensor:
        """[R]: True where the token at `places` [R] of `rows` [R] must not be drawn."""
        return self.waits[rows] | self.given[rows, places.clamp(max=self.ids.shape[1] - 1)]

    def used(self, row: int) -> int:
        """Number of tokens after the prompt in `row`, drawn or written by an environment."""
        return int((self.ids[row] != _UNDRAWN).sum())

    def has_end(self, rows: Tensor) -> Tensor:
        """[R]: True if the last turn of `rows` [R] has an end-of-sequence token."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        own = places >= self.turn_starts[rows, None]
        return (self.is_end(self.ids[rows]) & own).any(-1)

    def has_ended(self, row: int) -> bool:
        """True if the last turn of `row` ended by itself, not at `max_new_tokens`."""
        at = torch.tensor([row], device=self.ids.device)
        return bool(self.has_end(at)) or bool(self.stopped[row] <= self.ids.shape[1])

    def respond(self, row: int, used: int, *, ended: bool) -> None:
        """Send the turn of `row` that ends after `used` tokens to its environment."""
        self.waits[row] = True
        ids = self.ids[row, int(self.turn_starts[row]) : used].tolist()
        self.dialogue.respond(row, ids, used=used, ended=ended)

    def extend(self, row: int, used: int, ids: Sequence[int]) -> None:
        """Append the environment's answer `ids` to `row`; its next turn is drawn after them."""
        end = used + len(ids)
        self.ids[row, used:end] = torch.tensor(ids, device=self.ids.device)
        self.given[row, used:end] = True
        self.turns[row, end:] += 1
        self.turn_starts[row] = self.searched[row] = end
        self.stopped[row] = self.ids.shape[1] + 1
        self.waits[row] = False

    def keep_experts(self, chosen: Tensor, rows: Tensor, places: Tensor) -> None:
        """Record the experts [R, layers, k] of the states that predict `places` [R] of `rows`."""
        if not self.experts.shape[2]:
            self.experts = self.experts.new_zeros((*self.ids.shape, *chosen.shape[1:]))
        places = places.clamp(max=self.ids.shape[1] - 1)
        new = chosen.to(torch.int16)
        if self.dialogue.is_played:
            kept = self.keeps(rows, places)[:, None, None]
            new = torch.where(kept, self.experts[rows, places], new)
        self.experts[rows, places] = new

    def forget(self, row: int) -> None:
        """Clear `row`, which will be drawn again from its start."""
        self.ids[row] = _UNDRAWN
        self.searched[row] = 0
        self.stopped[row] = self.ids.shape[1] + 1
        self.given[row] = self.waits[row] = False
        self.turns[row] = self.turn_starts[row] = 0
        if self.dialogue.plays(row):
            self.dialogue.forget(row)

    def is_end(self, ids: Tensor) -> Tensor:
        """True where one of `ids` ends a response; the shape of `ids`."""
        return (ids[..., None] == self.ends).any(-1)

    def is_stopped(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """[R]: True if the first `drawn` [R] tokens of `rows` [R] contain a stop string."""
        if any(self.stops):
            for row, n in zip(rows.tolist(), drawn.tolist(), strict=True):
                if self.stops[row]:
                    self._search(row, n)
        return (self.stopped[rows] <= drawn) & ~self.waits[rows]

    def _search(self, row: int, drawn: int) -> None:
        """Search the tokens since the last search, and as many before as a stop string may span."""
        # A token with text has at least one byte.
        longest = max(len(stop.encode()) for stop in self.stops[row])
        start = self.searched[row]
        if drawn <= start:
            return
        first = max(start - longest - _SLACK, int(self.turn_starts[row]))
        ids = self.ids[row, first:drawn].tolist()
        self.searched[row] = drawn
        if not self._holds_stop(row, ids):
            return
        for end in range(start + 1, drawn + 1):
            if self._holds_stop(row, ids[: end - first]):
                self.stopped[row] = end
                return

    def _holds_stop(self, row: int, ids: list[int]) -> bool:
        text = self.chat.decode(ids)
        return any(stop in text for stop in self.stops[row])

    def responses(self, version: str) -> Responses:
        """The responses, each up to its first end, which is included.

        Args:
            version: label of the weights that were sampled from.
        """
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        # Ends of the last turn only: an end of an earlier turn stands before its answer.
        ends = self.is_end(self.ids) & (places >= self.turn_starts[:, None])
        ends |= places == self.stopped[:, None] - 1
        mask = (self.ids != _UNDRAWN) & (ends.cumsum(-1) - ends.long() == 0)
        longest = int(mask.sum(-1).max())
        mask = mask[:, :longest]

        def batch(table: Tensor) -> Tensor:
            return table[:, :longest].reshape(len(self.prompts), self.sampling.n, longest)

        cut = torch.zeros_like(self.waits)
        cut[list(self.dialogue.cut)] = True
        ended = (ends[:, :longest] & mask).any(-1) & ~cut
        records = [self.dialogue.record(row) for row in range(len(self.ids))]
        lengths, ids = mask.sum(-1).tolist(), self.ids[:, :longest].tolist()
        texts = [self.dialogue.text(row, ids[row][:n]) for row, n in enumerate(lengths)]
        responses = Responses.of_one_turn(
            prompts=self.prompts,
            ids=batch(self.ids[:, :longest].masked_fill(~mask, self.chat.pad_id)),
            sampled=batch(mask & ~self.given[:, :longest]),
            # Tokens were drawn after an end until it was noticed: drop their log-probs too.
            sampling_logprobs=batch(self.sampling_logprobs[:, :longest] * mask),
            policy_logprobs=batch(self.policy_logprobs[:, :longest] * mask),
            ended=ended.view(-1, self.sampling.n),
            texts=self._grouped(texts),
            temperature=self.sampling.temperature,
            version=version,
        )
        shape = (len(self.prompts), self.sampling.n, longest, *self.experts.shape[2:])
        return replace(
            responses,
            present=batch(mask),
            turns=batch(self.turns[:, :longest] * mask),
            episodes=self._grouped(records),
            experts=self.experts[:, :longest].reshape(shape),
        )

    def _grouped(self, rows: Sequence[T]) -> tuple[tuple[T, ...], ...]:
        n = self.sampling.n
        return tuple(tuple(rows[i : i + n]) for i in range(0, len(rows), n))
