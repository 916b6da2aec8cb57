"""Rows of tokens, prompt then response, and the hidden states that predict each response token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.attention import run_decoder
from scsdpo.policy.tree import token_tree


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """A micro-batch: R responses, each after a prompt of its own or one that it shares."""

    prompts: Sequence[tuple[int, ...]]
    """[R] prompt ids; equal ones are run once."""
    ids: Tensor
    """[R, L] int64 response ids, padded on the right."""
    mask: Tensor
    """[R, L] bool: True at response tokens; N of them in all."""
    pad_id: int

    @property
    def distinct_tokens(self) -> int:
        """Tokens of the responses, and of each distinct prompt once."""
        return int(self.mask.sum()) + sum(map(len, set(self.prompts)))


def hidden_states(model: PreTrainedModel, rows: Rows, *, share_prefixes: bool) -> Tensor:
    """Final hidden states that predict the response tokens, in row-major order.

    Both ways give the same numbers, to the rounding of the attention's summation order. The plain
    way is one padded row per response. With `share_prefixes` the micro-batch is a `TokenTree`:
    every common start runs once, forward and backward, and nothing is padded.

    Args:
        model: for shared prefixes, one that `use_layouts` was called on.
        rows: the micro-batch.
        share_prefixes: which way.

    Shapes:
        returns [N, D], N = rows.mask.sum().
    """
    if not share_prefixes:
        return _separate(model, rows)[rows.mask]
    tree = token_tree(rows.prompts, rows.ids, rows.mask)
    hidden = run_decoder(model, tree, input_ids=tree.ids[None], position_ids=tree.positions[None])
    return nn.functional.embedding(tree.predicts, hidden[0])


def _separate(model: PreTrainedModel, rows: Rows) -> Tensor:
    """[R, L, D] with one padded-right row per response."""
    device = rows.ids.device
    starts = torch.tensor([len(p) for p in rows.prompts], device=device)
    lengths = rows.mask.sum(-1)
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
    return hidden.gather(1, index)
