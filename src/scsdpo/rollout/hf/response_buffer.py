"""What decides the draws of a batch of responses, and what was drawn."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scsdpo.policy import Chat
from scsdpo.rollout.hf.draw import draw, uniforms
from scsdpo.types import Prompt, Responses, Sampling

_SLACK = 8
"""Tokens read before the shortest stretch that could hold a stop string: ends have no text."""
_UNDRAWN = -1
"""Stands where no token was drawn; no vocabulary has it."""


class ResponseBuffer:
    """One row a response, one place a token.

    Args:
        prompts: the Q questions; response i to question q is row q G + i.
        sampling: how to draw; its `max_new_tokens` is the number of places.
        chat: knows the ids that end a response.
        device: where it lies.
    """

    def __init__(
        self, prompts: Sequence[Prompt], sampling: Sampling, chat: Chat, device: torch.device
    ) -> None:
        self.prompts = tuple(prompts)
        self.sampling = sampling
        self.chat = chat
        self.ends = torch.tensor(chat.eos_ids, device=device)
        self.stops = [sampling.stops(p) for p in prompts for _ in range(sampling.n)]
        self.uniforms = uniforms(prompts, sampling).to(device)
        self.ids = torch.full(self.uniforms.shape, _UNDRAWN, device=device)
        self.sampling_logprobs = torch.zeros(self.ids.shape, device=device)
        self.policy_logprobs = torch.zeros(self.ids.shape, device=device)
        self.experts = self.ids.new_zeros((*self.ids.shape, 0, 0), dtype=torch.int16)
        """[Q G, L, layers, k] at the places that predict; layers is 0 until any are kept."""
        self.searched = [0] * len(self.stops)
        """[Q G] tokens of each response that were searched for stop strings."""
        self.stopped = torch.full((len(self.stops),), self.ids.shape[1] + 1, device=device)
        """[Q G] tokens when a stop string was complete; more than there are places: none was."""

    def draw(self, logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """[R]: a token for place `places` [R] of each of `rows` [R], drawn and kept.

        Args:
            logits: [R, V], divided by the temperature.
            rows: which responses.
            places: which token of each is next.
        """
        drawn = draw(logits, self.uniforms[rows, places], self.sampling)
        self.ids[rows, places] = drawn.ids
        self.sampling_logprobs[rows, places] = drawn.sampling_logprobs.float()
        self.policy_logprobs[rows, places] = drawn.policy_logprobs.float()
        return drawn.ids

    def keep_experts(self, chosen: Tensor, rows: Tensor, places: Tensor) -> None:
        """Note the experts [R, layers, k] at what predicts the tokens at `places` [R] of `rows`."""
        if not self.experts.shape[2]:
            self.experts = self.experts.new_zeros((*self.ids.shape, *chosen.shape[1:]))
        self.experts[rows, places] = chosen.to(torch.int16)

    def forget(self, row: int) -> None:
        """Row `row` will be drawn again from its start."""
        self.ids[row] = _UNDRAWN
        self.searched[row] = 0
        self.stopped[row] = self.ids.shape[1] + 1

    def is_end(self, ids: Tensor) -> Tensor:
        """Whether each of `ids` ends a response."""
        return (ids[..., None] == self.ends).any(-1)

    def is_stopped(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """[R]: whether a stop string stands in the `drawn` [R] tokens so far of `rows` [R]."""
        if any(self.stops):
            for row, n in zip(rows.tolist(), drawn.tolist(), strict=True):
                if self.stops[row]:
                    self._search(row, n)
        return self.stopped[rows] <= drawn

    def _search(self, row: int, drawn: int) -> None:
        """Read what was drawn since the last search, and as much before as a string may need."""
        # A token with text has at least one byte of it.
        longest = max(len(stop.encode()) for stop in self.stops[row])
        start = self.searched[row]
        first = max(start - longest - _SLACK, 0)
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
        """Everything up to the first end of each response, that one included.

        Args:
            version: of the weights that were sampled from.
        """
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        ends = self.is_end(self.ids) | (places == self.stopped[:, None] - 1)
        mask = (self.ids != _UNDRAWN) & (ends.cumsum(-1) - ends.long() == 0)
        longest = int(mask.sum(-1).max())
        mask = mask[:, :longest]

        def batch(table: Tensor) -> Tensor:
            return table[:, :longest].reshape(len(self.prompts), self.sampling.n, longest)

        made = Responses.of_one_turn(
            prompts=self.prompts,
            ids=batch(self.ids[:, :longest].masked_fill(~mask, self.chat.pad_id)),
            sampled=batch(mask),
            # Steps between an end and its being noticed drew on: drop their log-probs too.
            sampling_logprobs=batch(self.sampling_logprobs[:, :longest] * mask),
            policy_logprobs=batch(self.policy_logprobs[:, :longest] * mask),
            ended=(ends[:, :longest] & mask).any(-1).view(-1, self.sampling.n),
            texts=self._texts(mask),
            temperature=self.sampling.temperature,
            version=version,
        )
        shape = (len(self.prompts), self.sampling.n, longest, *self.experts.shape[2:])
        return replace(made, experts=self.experts[:, :longest].reshape(shape))

    def _texts(self, mask: Tensor) -> tuple[tuple[str, ...], ...]:
        lengths = mask.sum(-1).tolist()
        rows = self.ids[:, : mask.shape[1]].tolist()
        texts = [self.chat.decode(row[:n]) for row, n in zip(rows, lengths, strict=True)]
        n = self.sampling.n
        return tuple(tuple(texts[i : i + n]) for i in range(0, len(texts), n))
