"""Rows of tokens (a prompt, then a response), and their forward as padded rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.decoder import decoder_of
from scsdpo.policy.experts import final_states
from scsdpo.policy.transfer import upload


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """R responses, each after its prompt. Responses may share a prompt. Tensors are on the host."""

    prompts: Sequence[tuple[int, ...]]
    """[R] token ids of each row's prompt; equal prompts run once."""
    ids: Tensor
    """[R, L] int64 response ids, padded on the right."""
    present: Tensor
    """[R, L] bool: a token stands here, and later tokens attend to it. True on a prefix of L."""
    sampled: Tensor
    """[R, L] bool: the policy drew this token, and a hidden state must predict it. N in all."""
    pad_id: int
    """Id that fills places without a token."""

    @property
    def distinct_tokens(self) -> int:
        """Number of tokens of all responses and of each distinct prompt."""
        return int(self.present.sum()) + sum(map(len, set(self.prompts)))

    def at(self, chosen: Sequence[int]) -> "Rows":
        """The `chosen` rows, padded only to the longest of them."""
        index = list(chosen)
        present = self.present[index]
        width = int(present.sum(-1).max())
        return Rows(
            prompts=[self.prompts[row] for row in index],
            ids=self.ids[index, :width],
            present=present[:, :width],
            sampled=self.sampled[index, :width],
            pad_id=self.pad_id,
        )

    def to(self, device: torch.device) -> "Rows":
        """A copy whose tensors are on `device`."""
        sizes = self.ids.shape
        tables = (self.ids, self.present.long(), self.sampled.long())
        ids, present, sampled = upload([table.flatten() for table in tables], device)
        return replace(
            self,
            ids=ids.view(sizes),
            present=present.view(sizes).bool(),
            sampled=sampled.view(sizes).bool(),
        )

    def nothing(self) -> "Rows":
        """One row: a prompt of one padding token, and no response."""
        return Rows(
            prompts=[(self.pad_id,)],
            ids=self.ids.new_full((1, 1), self.pad_id),
            present=self.present.new_zeros((1, 1)),
            sampled=self.sampled.new_zeros((1, 1)),
            pad_id=self.pad_id,
        )


def separate_rows(model: PreTrainedModel, rows: Rows, routers: Sequence[nn.Module] = ()) -> Tensor:
    """Hidden states that predict the sampled tokens, one padded row for each response.

    Shapes:
        [N, D + layers E], in row-major order: behind each state stand the logits of `routers` at
        the same token (`final_states`).
    """
    rows = rows.to(model.device)
    device, decoder = rows.ids.device, decoder_of(model)
    starts = torch.tensor([len(p) for p in rows.prompts], device=device)
    # No state is needed after the last token of a response, so it is not run.
    lengths = (rows.present.sum(-1) - 1).clamp(min=0)
    total = starts + lengths
    width = int(total.max())
    ids = torch.full((len(rows.prompts), width), rows.pad_id, device=device)
    for row, prompt, response, n in zip(ids, rows.prompts, rows.ids, lengths.tolist(), strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
        row[len(prompt) : len(prompt) + n] = response[:n]
    places = torch.arange(width, device=device)
    # The model makes its own positions: some models count from 2, some from a carried state.
    inputs = {"input_ids": ids}
    if bool((total < width).any()) and "attention_mask" in signature(decoder.forward).parameters:
        inputs["attention_mask"] = (places < total[:, None]).long()
    reset_frequencies(decoder)
    hidden = final_states(model, routers, **inputs, use_cache=False)
    # The state at place t predicts the token at t + 1.
    predicts = starts[:, None] - 1 + torch.arange(rows.ids.shape[1], device=device)
    index = predicts.clamp(max=width - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)[rows.sampled]


def reset_frequencies(model: nn.Module) -> None:
    """Let the next forward choose rotary frequencies by its own length.

    A dynamic rotary embedding would keep the frequencies of the longest row so far.
    """
    for part in model.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            first = name.removesuffix("max_seq_len_cached") + "inv_freq"
            original = getattr(part, first.replace("inv_freq", "original_inv_freq"), None)
            if original is not None and getattr(part, name) != part.original_max_seq_len:
                setattr(part, name, part.original_max_seq_len)
                setattr(part, first, original)
