"""Rows of tokens, prompt then response, and the plain way to run them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scsdpo.policy.upload import upload


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """R responses, each after a prompt of its own or one that it shares."""

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


def separate_rows(model: PreTrainedModel, rows: Rows) -> Tensor:
    """[N, D] hidden states that predict the sampled tokens, in row-major order."""
    rows = rows.to(model.device)
    device = rows.ids.device
    starts = torch.tensor([len(p) for p in rows.prompts], device=device)
    lengths = rows.present.sum(-1)
    total = starts + lengths
    width = int(total.max())
    ids = torch.full((len(rows.prompts), width), rows.pad_id, device=device)
    for row, prompt, response, n in zip(ids, rows.prompts, rows.ids, lengths.tolist(), strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
        row[len(prompt) : len(prompt) + n] = response[:n]
    places = torch.arange(width, device=device)
    hidden = (
        model.get_decoder()(
            input_ids=ids,
            attention_mask=(places < total[:, None]).long(),
            position_ids=places.expand(len(ids), -1),
            use_cache=False,
        )
    ).last_hidden_state
    # The state at place t predicts the token at t + 1.
    predicts = starts[:, None] - 1 + torch.arange(rows.ids.shape[1], device=device)
    index = predicts.clamp(max=width - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)[rows.sampled]
