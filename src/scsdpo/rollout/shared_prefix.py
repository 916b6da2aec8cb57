"""Attention of a group of responses to one prompt whose keys and values are stored once.

The buffers live here, so no transformers cache and no attention mask is built, and the padding of
prompts is on the right.

Shapes: P prompts in flight, R responses in flight, M most responses to one prompt, T longest
prompt, t most tokens of a response so far, K key/value heads, q query heads to each of them,
d head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.attention import AttentionLayout, use_layouts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layer:
    """Buffers of one layer. Zeros at first: a masked place must not hold NaN."""

    prompt_keys: Tensor
    """[P, K, T, d]."""
    prompt_values: Tensor
    keys: Tensor
    """[R, K, t, d]."""
    values: Tensor


class PrefixCache:
    """Preallocated keys and values: one slot a prompt, one slot a response; slots 0.. are in use.

    Args:
        prompts: slots for prompts.
        prompt_tokens: longest prompt.
        rows: slots for responses.
        new_tokens: longest response that is read back; the last token of one never is.
    """

    def __init__(self, *, prompts: int, prompt_tokens: int, rows: int, new_tokens: int) -> None:
        self.prompt_shape = (prompts, prompt_tokens)
        self.row_shape = (rows, new_tokens)
        self.layers: dict[int, _Layer] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> _Layer:
        """The buffers of layer `index`, made to fit `key` and `value` when first asked for."""
        if index not in self.layers:
            self.layers[index] = _Layer(
                prompt_keys=_zeros(self.prompt_shape, key),
                prompt_values=_zeros(self.prompt_shape, value),
                keys=_zeros(self.row_shape, key),
                values=_zeros(self.row_shape, value),
            )
        return self.layers[index]

    def move_prompts(self, to: Tensor, source: Tensor) -> None:
        """Copy prompt slots `source` over the slots `to`."""
        for layer in self.layers.values():
            layer.prompt_keys[to] = layer.prompt_keys[source]
            layer.prompt_values[to] = layer.prompt_values[source]

    def move_rows(self, to: Tensor, source: Tensor, tokens: int) -> None:
        """Copy the first `tokens` places of response slots `source` over the slots `to`."""
        for layer in self.layers.values():
            layer.keys[to, :, :tokens] = layer.keys[source, :, :tokens]
            layer.values[to, :, :tokens] = layer.values[source, :, :tokens]


def _zeros(shape: tuple[int, int], like: Tensor) -> Tensor:
    slots, tokens = shape
    return like.new_zeros(slots, like.shape[1], tokens, like.shape[3])


class Prefill(AttentionLayout):
    """Prompts, padded on the right, attend causally; their keys and values are kept."""

    def __init__(self, cache: PrefixCache, first: int) -> None:
        self.cache = cache
        self.first = first

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        buffers = self.cache.layer(layer, key, value)
        slots = slice(self.first, self.first + len(key))
        tokens = key.shape[2]
        buffers.prompt_keys[slots, :, :tokens] = key
        buffers.prompt_values[slots, :, :tokens] = value
        mask = None
        if window is not None and window < tokens:
            ones = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device)
            mask = ones.tril() & ones.triu(1 - window)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=1.0, enable_gqa=True
        ).transpose(1, 2)


class Decode(AttentionLayout):
    """One new token of every response attends to its prompt and to its own tokens so far.

    The scores against a prompt are one matrix product for all responses to it, so its keys are
    read once, not once a response. Responses leave at different times: those that stay are
    scattered into a rectangle [P, M] for the product and gathered from it again.

    Args:
        cache: the buffers.
        prompt_of: [R] prompt slot of each response.
        prompt_lengths: [P] tokens in each prompt.
    """

    def __init__(self, cache: PrefixCache, prompt_of: Tensor, prompt_lengths: Tensor) -> None:
        self.cache = cache
        self.starts = prompt_lengths[prompt_of]
        self.prompt_tokens = int(prompt_lengths.max())
        member = _rank_in_group(prompt_of, len(prompt_lengths))
        self.rectangle = (len(prompt_lengths), int(member.max()) + 1)
        self.place = (prompt_of, slice(None), member)
        self.rows = torch.arange(len(prompt_of), device=prompt_of.device)

    def at(self, column: Tensor, tokens: int) -> None:
        """Set where the new tokens go: place `column` [R] of each response, all below `tokens`."""
        self.column = column
        self.tokens = tokens
        self._biases: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        buffers = self.cache.layer(layer, key, value)
        buffers.keys[self.rows, :, self.column] = key[:, :, 0]
        buffers.values[self.rows, :, self.column] = value[:, :, 0]
        own, prompts = slice(len(self.rows)), slice(self.rectangle[0])
        grouped = query.reshape(len(self.rows), key.shape[1], -1, query.shape[-1])
        scores = torch.cat(
            [
                self._by_prompt(grouped, buffers.prompt_keys[prompts, :, : self.prompt_tokens].mT),
                grouped @ buffers.keys[own, :, : self.tokens].mT,
            ],
            dim=-1,
        )
        weights = (scores + self._bias(window)).softmax(-1).to(value.dtype)
        to_prompt, to_own = weights.split([self.prompt_tokens, self.tokens], dim=-1)
        mixed = to_own @ buffers.values[own, :, : self.tokens]
        mixed += self._by_prompt(to_prompt, buffers.prompt_values[prompts, :, : self.prompt_tokens])
        return mixed.view(len(self.rows), 1, -1, mixed.shape[-1])

    def _by_prompt(self, rows: Tensor, of_prompt: Tensor) -> Tensor:
        """[R, K, q, a] times the response's prompt's [P, K, a, b] -> [R, K, q, b]."""
        prompts, members = self.rectangle
        _, heads, queries, inner = rows.shape
        packed = rows.new_empty(prompts, heads, members, queries, inner)
        packed[self.place] = rows
        product = packed.view(prompts, heads, members * queries, inner) @ of_prompt
        return product.view(prompts, heads, members, queries, -1)[self.place]

    def _bias(self, window: int | None) -> Tensor:
        """[R, 1, 1, T + t]: 0 where the new token looks, -inf elsewhere."""
        if window not in self._biases:
            prompt = torch.arange(self.prompt_tokens, device=self.column.device)
            own = torch.arange(self.tokens, device=self.column.device)
            sees_prompt = prompt < self.starts[:, None]
            sees_own = own <= self.column[:, None]
            if window is not None:
                oldest = self.column[:, None] - window + 1  # as a place of the response
                sees_prompt &= prompt >= oldest + self.starts[:, None]
                sees_own &= own >= oldest
            hidden = ~torch.cat([sees_prompt, sees_own], dim=1)
            bias = torch.zeros(hidden.shape, device=hidden.device)
            self._biases[window] = bias.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._biases[window]


def _rank_in_group(group: Tensor, groups: int) -> Tensor:
    """[R]: how many earlier entries of `group` [R] (values in [0, groups)) equal this one."""
    order = group.argsort(stable=True)
    sizes = group.bincount(minlength=groups)
    rank = torch.empty_like(group)
    rank[order] = (
        torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    )
    return rank


@contextmanager
def shared_prefix_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend by layouts, whatever its attention implementation is outside."""
    before = model.config._attn_implementation
    use_layouts(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
