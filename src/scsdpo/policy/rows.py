"""Rows of tokens, prompt then response, and the plain way to run them."""

from collections.abc import Mapping, Sequence
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
    """R responses, each after a prompt of its own or one that it shares; tensors of the host."""

    prompts: Sequence[tuple[int, ...]]
    """[R] prompt ids; equal ones are run once."""
    ids: Tensor
    """[R, L] int64 response ids, padded on the right."""
    present: Tensor
    """[R, L] bool: a token stands here, and later ones attend to it; a prefix of L."""
    sampled: Tensor
    """[R, L] bool: the tokens among them that are predicted; N of them in all."""
    pad_id: int

    @property
    def distinct_tokens(self) -> int:
        """Tokens of the responses, and of each distinct prompt once."""
        return int(self.present.sum()) + sum(map(len, set(self.prompts)))

    def at(self, chosen: Sequence[int]) -> "Rows":
        """Some of them, without the padding that only others need."""
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
        """The same on `device`."""
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
        """A prompt of one token, and no response."""
        return Rows(
            prompts=[(self.pad_id,)],
            ids=self.ids.new_full((1, 1), self.pad_id),
            present=self.present.new_zeros((1, 1)),
            sampled=self.sampled.new_zeros((1, 1)),
            pad_id=self.pad_id,
        )


def separate_rows(model: PreTrainedModel, rows: Rows, routers: Sequence[nn.Module] = ()) -> Tensor:
    """[N, D] hidden states that predict the sampled tokens, in row-major order.

    Behind them what `routers` say of their places (`final_states`).
    """
    rows = rows.to(model.device)
    device, decoder = rows.ids.device, decoder_of(model)
    starts = torch.tensor([len(p) for p in rows.prompts], device=device)
    # A response's last token predicts nothing and is left out.
    lengths = (rows.present.sum(-1) - 1).clamp(min=0)
    total = starts + lengths
    width = int(total.max())
    ids = torch.full((len(rows.prompts), width), rows.pad_id, device=device)
    for row, prompt, response, n in zip(ids, rows.prompts, rows.ids, lengths.tolist(), strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
        row[len(prompt) : len(prompt) + n] = response[:n]
    places = torch.arange(width, device=device)
    # Positions are the model's own: some count from 2, some from the states that they carry.
    inputs = {"input_ids": ids}
    if bool((total < width).any()) and "attention_mask" in _arguments(decoder):
        inputs["attention_mask"] = (places < total[:, None]).long()
    reset_frequencies(decoder)
    hidden = final_states(model, routers, **inputs, use_cache=False)
    # The state at place t predicts the token at t + 1.
    predicts = starts[:, None] - 1 + torch.arange(rows.ids.shape[1], device=device)
    index = predicts.clamp(max=width - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)[rows.sampled]


def _arguments(decoder: nn.Module) -> Mapping[str, object]:
    return signature(decoder.forward).parameters


def reset_frequencies(model: nn.Module) -> None:
    """Let the next forward choose rotary frequencies by its own length.

    A dynamic embedding keeps those of the longest row so far until a short one comes.
    """
    for part in model.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            first = name.removesuffix("max_seq_len_cached") + "inv_freq"
            original = getattr(part, first.replace("inv_freq", "original_inv_freq"), None)
            if original is not None and getattr(part, name) != part.original_max_seq_len:
                setattr(part, name, part.original_max_seq_len)
                setattr(part, first, original)
