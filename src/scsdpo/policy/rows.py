"""Rows of tokens, prompt then response, and the hidden states that predict each response token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


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


def hidden_states(model: PreTrainedModel, rows: Rows, *, share_prefixes: bool) -> Tensor:
    """Final hidden states that predict the response tokens, in row-major order.

    Both ways give the same numbers (to the rounding of the attention's summation order):
    separate rows are the plain way; with `share_prefixes` each distinct prompt runs once and its
    key/value cache, kept in the autograd graph, is repeated over the responses that follow it.

    Shapes:
        returns [N, D], N = rows.mask.sum().
    """
    run = _shared if share_prefixes else _separate
    return run(model, rows)[rows.mask]


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


def _shared(model: PreTrainedModel, rows: Rows) -> Tensor:
    """[R, L, D] with each distinct prompt run once.

    Prompts are padded on the left: sliding-window caches keep the last positions, and right
    padding there is silently wrong. The first response token is predicted from the prompt's own
    last state, which keeps that state in the graph.
    """
    device = rows.ids.device
    distinct = list(dict.fromkeys(rows.prompts))
    where = {prompt: i for i, prompt in enumerate(distinct)}
    of_row = torch.tensor([where[p] for p in rows.prompts], device=device)
    width = max(map(len, distinct))
    ids = torch.tensor(
        [[rows.pad_id] * (width - len(p)) + list(p) for p in distinct], device=device
    )
    lengths = torch.tensor([len(p) for p in distinct], device=device)
    mask = torch.arange(width, device=device) >= (width - lengths)[:, None]
    decoder = model.get_decoder()
    cache = DynamicCache(config=model.config)
    prompt_states = decoder(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    first = prompt_states[of_row, -1:]
    if rows.ids.shape[1] == 1:
        return first
    assert cache.get_seq_length() == width, "the decoder dropped the prompt's cache"
    cache.batch_select_indices(of_row)
    steps = torch.arange(rows.ids.shape[1] - 1, device=device)
    rest = decoder(
        input_ids=rows.ids[:, :-1],
        attention_mask=torch.cat([mask[of_row], rows.mask[:, :-1]], dim=1).long(),
        position_ids=lengths[of_row, None] + steps,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], dim=1)
