"""Attention of a group of responses to one prompt whose keys and values are stored once.

The layouts here keep keys and values themselves, so transformers builds no cache and no attention
mask. Prompts are padded on the right. Scores are float32 whatever the model's dtype.

Shapes: P prompts in flight, R responses in flight, T tokens of the longest prompt, t most tokens of
a response of a bucket so far, K key/value heads, q query heads for each of them, d head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.policy.attention import attend_beside_sinks, use_layouts
from scsdpo.policy.layout_contract import AttentionLayout
from scsdpo.policy.segment_attention import Own, SegmentAttention
from scsdpo.policy.segment_states import (
    DeltaInputs,
    SegmentStates,
    Span,
    convolve_one,
    delta_rule_one,
)
from scsdpo.private.transformers import attention_of
from scsdpo.rollout.hf.kv_cache import KVCache, KVTable, LayerCache

_STRIP_COST = 4096
"""Cost of one more product, as the number of (query, prompt token) pairs with the same cost."""
_MOST_HALVINGS = 2
"""Prompts are cut into at most 2 to this power strips."""


class Prefill(AttentionLayout):
    """Prompts, padded on the right, attend causally; their keys and values are kept.

    Args:
        cache: takes the keys and values.
        first: slot of the first prompt; the others follow.
        lengths: [p] tokens of each prompt.
    """

    def __init__(self, cache: KVCache, first: int, lengths: Tensor) -> None:
        self.cache = cache
        self.slots = slice(first, first + len(lengths))
        self.lengths = lengths
        self._segments: SegmentStates | None = None
        self._attention: SegmentAttention | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self._keep(self.cache.layer(layer, key, value, window).prompts, key, value)
        tokens = key.shape[2]
        if sinks is not None:
            return self._beside_sinks(query, key, value, layer, window, sinks)
        mask = None
        if window is not None and window < tokens:
            ones = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device)
            mask = ones.tril() & ones.triu(1 - window)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=1.0, enable_gqa=True
        ).transpose(1, 2)

    def _beside_sinks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: int,
        window: int | None,
        sinks: Tensor,
    ) -> Tensor:
        """Attention with sinks by `SegmentAttention`, which needs no table of scores."""
        rows, tokens = len(query), query.shape[2]
        if self._attention is None:
            places = (slice(row * tokens, (row + 1) * tokens) for row in range(rows))
            own = [Own(tokens=each, position=0) for each in places]
            self._attention = SegmentAttention(own, [], query.device)
        flat = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        mixed = self._attention.attend(*flat, layer=layer, window=window, sinks=sinks)
        return mixed.unflatten(0, (rows, tokens))

    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mixed, ends = self._spans(inputs.shape[1]).convolve(
            inputs.flatten(0, 1), weight, bias, None
        )
        self.cache.states.keep(layer, 0, ends)
        return mixed.view_as(inputs)

    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        flat = DeltaInputs(*(x.flatten(0, 1) for x in inputs))
        spans = self._spans(inputs.value.shape[1])
        mixed, ends = spans.delta_rule(flat, None, ends=True)
        self.cache.states.keep(layer, 1, ends)
        return mixed.view_as(inputs.value)

    def _spans(self, width: int) -> SegmentStates:
        """The prompts as spans among rows of `width` tokens laid end to end."""
        if self._segments is None:
            lengths = self.lengths.tolist()
            spans = [Span(row * width, length, above=None) for row, length in enumerate(lengths)]
            self._segments = SegmentStates(spans, len(lengths) * width, self.lengths.device)
        return self._segments

    def _keep(self, table: KVTable, key: Tensor, value: Tensor) -> None:
        tokens = key.shape[2]
        if table.window is not None and table.window < tokens:
            # The last `window` tokens of each prompt; a shorter prompt is there completely.
            first = (self.lengths - table.window).clamp(min=0)
            places = first[:, None] + torch.arange(table.window, device=key.device)
            index = places[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
            key, value = key.gather(2, index), value.gather(2, index)
            tokens = table.window
        table.keys[self.slots, :, :tokens] = key.to(table.keys.dtype)
        table.values[self.slots, :, :tokens] = value


@dataclass(frozen=True, slots=True, eq=False)
class _Strip:
    """Neighbouring prompts whose responses attend to them in one batched matrix product."""

    prompts: slice
    """Slots of the prompts."""
    tokens: int
    """Tokens of the longest of them."""
    members: int
    """Most responses to one of them."""
    rows: Tensor | slice
    """[r] their responses."""
    place: tuple[Tensor, slice, Tensor]
    """Index of each of `rows` in the product: (prompt within the strip, all heads, member)."""


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    """The n responses of one bucket."""

    index: int
    """Number of the bucket."""
    rows: slice
    """Its responses among all R."""
    slots: Tensor
    """[n] their slots: 0, 1, ..."""


class Decode(AttentionLayout):
    """One new token of every response attends to its prompt and to its own tokens so far.

    The scores of all responses to a prompt are one matrix product, so its keys are read once.
    Neighbouring prompts form a strip and share one batched product, padded to the most responses
    that one of them has. If this wastes much, the strip is cut.

    Args:
        cache: holds keys and values.
        prompt_of: [R] prompt slot of each response.
        prompt_lengths: [P] tokens of the prompt in each slot; 0: the slot is empty.
        buckets: (bucket, number of responses in it); responses come in this order.
    """

    def __init__(
        self,
        cache: KVCache,
        prompt_of: Tensor,
        prompt_lengths: Sequence[int],
        buckets: Sequence[tuple[int, int]],
    ) -> None:
        self.cache = cache
        device = prompt_of.device
        self.starts = torch.tensor(prompt_lengths, device=device)[prompt_of]
        self.strips = _strips(prompt_of, prompt_lengths)
        self.prompt_tokens = max(strip.tokens for strip in self.strips)
        self.buckets: list[_Bucket] = []
        first = 0
        for bucket, rows in buckets:
            slots = torch.arange(rows, device=device)
            self.buckets.append(_Bucket(bucket, slice(first, first + rows), slots))
            first += rows

    def at(self, columns: Tensor, tokens: Sequence[int]) -> None:
        """Set the places `columns` [R] of the new tokens, below `tokens` of each bucket."""
        self.columns = columns
        self.cache.states.at(columns)
        self.tokens = tokens
        self._hidden: dict[int | None, list[Tensor]] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            kept = self.cache.layer(layer, key, value, window)
            query = query.to(value.dtype).view(len(query), key.shape[1], -1, query.shape[-1])
            return self._attend(kept, query, key.to(value.dtype), value, window, sinks)

    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        states, fresh = self.cache.states.rows[layer], self.cache.states.fresh
        mixed, ends = convolve_one(inputs[:, 0], weight, bias, states[0])
        states[0] = torch.where(fresh[:, None, None], ends, states[0])
        return mixed[:, None]

    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        flat, fresh = DeltaInputs(*(x[:, 0] for x in inputs)), self.cache.states.fresh[:, None]
        # A token that runs again must not change the state: no decay, no write.
        flat = flat._replace(decay=flat.decay * fresh, rate=flat.rate * fresh)
        return delta_rule_one(flat, self.cache.states.rows[layer][1])[:, None]

    def _attend(
        self,
        layer: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        to_prompts = self._scores(query, layer.prompts)
        to_own, mixed = [], []
        places = self.columns if window is None else self.columns % window
        hidden = self._hidden_places(window)
        for bucket, tokens, hides in zip(self.buckets, self.tokens, hidden, strict=True):
            table, rows = layer.buckets[bucket.index], bucket.rows
            table.keys[bucket.slots, :, places[rows]] = key[rows, :, 0]
            table.values[bucket.slots, :, places[rows]] = value[rows, :, 0]
            own = (slice(len(bucket.slots)), slice(None), slice(tokens))
            scores = _product(query[rows], table.keys[own].mT)
            scores = torch.cat([to_prompts[rows], scores], -1).masked_fill_(hides, -torch.inf)
            prompts, width = to_prompts.shape[-1], scores.shape[-1]
            if sinks is not None:
                of_sinks = sinks.to(scores.dtype).view(*scores.shape[1:3], 1)
                scores = torch.cat([scores, of_sinks.expand(len(scores), -1, -1, 1)], -1)
            weights = scores.softmax(-1).to(value.dtype)
            to_own.append(weights[..., :prompts])
            mixed.append(_product(weights[..., prompts:width], table.values[own]))
        result = _cat(mixed)
        self._add_values(result, _cat(to_own), layer.prompts)
        return result.view(len(query), 1, -1, result.shape[-1]).to(value.dtype)

    def _scores(self, query: Tensor, prompts: KVTable) -> Tensor:
        """[R, K, q, T] float32: scores of each response's query against its prompt."""
        scores: Tensor | None = None
        width = prompts.keys.shape[2]
        for strip in self.strips:
            keys = prompts.keys[strip.prompts, :, : strip.tokens]
            product = _by_prompt(strip, query, keys.mT)
            if len(self.strips) == 1:
                return product
            if scores is None:
                scores = product.new_zeros(*query.shape[:3], min(self.prompt_tokens, width))
            scores[strip.rows, ..., : product.shape[-1]] = product
        assert scores is not None
        return scores

    def _add_values(self, mixed: Tensor, weights: Tensor, prompts: KVTable) -> None:
        """Add `weights` [R, K, q, T] times the prompts' values to `mixed` [R, K, q, d]."""
        for strip in self.strips:
            values = prompts.values[strip.prompts, :, : strip.tokens]
            product = _by_prompt(strip, weights[..., : values.shape[2]], values)
            if len(self.strips) == 1:
                mixed += product
            else:
                mixed[strip.rows] += product

    def _hidden_places(self, window: int | None) -> list[Tensor]:
        """[n, 1, 1, T + t] for each bucket: True where its new tokens do not see a key."""
        if window not in self._hidden:
            device = self.columns.device
            width = self.prompt_tokens if window is None else min(self.prompt_tokens, window)
            positions = torch.arange(width, device=device).expand(len(self.starts), -1)
            if window is not None:  # only a prompt's last `window` tokens are held
                positions = positions + (self.starts - window).clamp(min=0)[:, None]
            hidden = positions >= self.starts[:, None]
            if window is not None:
                hidden |= positions <= (self.starts + self.columns - window)[:, None]
            self._hidden[window] = []
            for bucket, tokens in zip(self.buckets, self.tokens, strict=True):
                # A full window is a ring buffer: all that it holds is seen.
                own = torch.arange(tokens if window is None else min(tokens, window), device=device)
                ahead = own > self.columns[bucket.rows, None]
                of_bucket = torch.cat([hidden[bucket.rows], ahead], dim=1)
                self._hidden[window].append(of_bucket[:, None, None])
        return self._hidden[window]


class Extend(AttentionLayout):
    """Several new tokens of some responses of a bucket attend to all tokens before them.

    Their keys and values are appended to those that are held. Padding is on the right.

    Args:
        cache: holds keys and values.
        bucket: number of the responses' bucket.
        slots: [r] slots of the responses in the bucket.
        prompt_of: [r] prompt slot of each.
        starts: [r] tokens of each prompt.
        held: [r] tokens of each response whose keys and values are held.
        new: [r] number of new tokens.
    """

    def __init__(
        self,
        cache: KVCache,
        bucket: int,
        *,
        slots: Tensor,
        prompt_of: Tensor,
        starts: Tensor,
        held: Tensor,
        new: Tensor,
    ) -> None:
        self.cache, self.bucket = cache, bucket
        self.slots, self.prompt_of, self.starts = slots, prompt_of, starts
        self.held, self.new = held, new
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            kept = self.cache.layer(layer, key, value, window)
            prompts, own = kept.prompts, kept.buckets[self.bucket]
            query, key = query.to(value.dtype), key.to(value.dtype)
            keys = torch.cat([prompts.keys[self.prompt_of], own.keys[self.slots], key], dim=2)
            values = torch.cat(
                [prompts.values[self.prompt_of], own.values[self.slots], value], dim=2
            )
            widths = (prompts.keys.shape[2], own.keys.shape[2], key.shape[2])
            mask = self._mask(window, widths)
            if sinks is not None:
                mixed = attend_beside_sinks(query, keys, values, mask, sinks)
            else:
                mixed = nn.functional.scaled_dot_product_attention(
                    query, keys, values, mask, scale=1.0, enable_gqa=True
                )
            self._keep(own, key, value)
            return mixed.transpose(1, 2)

    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("models with states run these tokens one by one")

    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        raise AssertionError("models with states run these tokens one by one")

    def _mask(self, window: int | None, widths: tuple[int, int, int]) -> Tensor:
        """[r, 1, N, T + t + N]: True where a new token sees a key."""
        if window not in self._masks:
            device = self.starts.device
            starts, held = self.starts[:, None], self.held[:, None]
            prompt, own, new = (torch.arange(width, device=device)[None] for width in widths)
            if window is None:
                first, columns = torch.zeros_like(starts), own.expand(len(starts), -1)
            else:
                # A prompt's last tokens stand at the left. A response's place p holds the last
                # token c with c % window = p.
                first = (starts - window).clamp(min=0)
                columns = held - 1 - (held - 1 - own) % window
            at = [prompt + first, starts + columns, starts + held + new]
            there = [
                prompt + first < starts,
                (columns >= 0) & (columns < held),
                new < self.new[:, None],
            ]
            keys = torch.cat([each.expand(len(starts), -1) for each in at], dim=1)
            exist = torch.cat([each.expand(len(starts), -1) for each in there], dim=1)
            ahead = at[2][:, :, None] - keys[:, None]
            sees = exist[:, None] & (ahead >= 0)
            if window is not None:
                sees &= ahead < window
            # Padding sees all keys: without any, softmax would give nan.
            sees |= (new >= self.new[:, None])[:, :, None]
            self._masks[window] = sees[:, None]
        return self._masks[window]

    def _keep(self, table: KVTable, key: Tensor, value: Tensor) -> None:
        places = torch.arange(key.shape[2], device=key.device)
        written = places < self.new[:, None]
        if table.window is not None:  # if two tokens have one place, the later is kept
            written &= places >= self.new[:, None] - table.window
        row, place = written.nonzero(as_tuple=True)
        columns = self.held[row] + place
        if table.window is not None:
            columns = columns % table.window
        table.keys[self.slots[row], :, columns] = key[row, :, place]
        table.values[self.slots[row], :, columns] = value[row, :, place]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b for [n, K, x, y] and [n, K, y, z]; the result is float32 if they are narrower."""
    if a.dtype.itemsize >= torch.float32.itemsize:
        return a @ b
    if a.is_cuda:
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return product.view(*a.shape[:3], -1)
    return a.float() @ b.float()


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_prompt(strip: _Strip, rows: Tensor, of_prompt: Tensor) -> Tensor:
    """[R, K, q, a] of responses times [p, K, a, b] of their prompts -> [r, K, q, b]."""
    _, heads, queries, inner = rows.shape
    prompts = strip.prompts.stop - strip.prompts.start
    packed = rows.new_empty(prompts, heads, strip.members, queries, inner)
    packed[strip.place] = rows[strip.rows]
    product = _product(packed.view(prompts, heads, strip.members * queries, inner), of_prompt)
    return product.view(prompts, heads, strip.members, queries, -1)[strip.place]


def _strips(prompt_of: Tensor, lengths: Sequence[int]) -> list[_Strip]:
    members = prompt_of.bincount(minlength=len(lengths))
    rank = _rank_in_group(prompt_of, members)
    counts = members.tolist()
    strips = []
    for first, last in _cuts(counts, lengths, (0, len(lengths)), _MOST_HALVINGS):
        if (most := max(counts[first:last])) == 0:
            continue
        rows: Tensor | slice = slice(None)
        if sum(counts[first:last]) < len(prompt_of):
            rows = ((prompt_of >= first) & (prompt_of < last)).nonzero()[:, 0]
        place = (prompt_of[rows] - first, slice(None), rank[rows])
        longest = max(lengths[first:last])
        strips.append(_Strip(slice(first, last), longest, most, rows, place))
    return strips


def _cuts(
    members: Sequence[int], lengths: Sequence[int], bounds: tuple[int, int], halvings: int
) -> list[tuple[int, int]]:
    """Cut the prompts within `bounds` where it saves most padding, up to `halvings` times."""
    first, last = bounds

    def costs(order: range) -> list[int]:
        """Cost of the strip from the first prompt of `order` to each of them."""
        most = longest = 0
        found = []
        for size, i in enumerate(order, start=1):
            most, longest = max(most, members[i]), max(longest, lengths[i])
            found.append(size * most * longest)
        return found

    ahead, behind = costs(range(first, last)), costs(range(last - 1, first - 1, -1))[::-1]
    whole = ahead[-1]
    if halvings == 0 or last - first < 2 or whole <= _STRIP_COST:
        return [bounds]
    cost, cut = min((ahead[i - first - 1] + behind[i - first], i) for i in range(first + 1, last))
    if cost + _STRIP_COST >= whole:
        return [bounds]
    return [
        *_cuts(members, lengths, (first, cut), halvings - 1),
        *_cuts(members, lengths, (cut, last), halvings - 1),
    ]


def _rank_in_group(group: Tensor, sizes: Tensor) -> Tensor:
    """[R]: number of earlier entries of `group` [R] with the same value; `sizes`: of each group."""
    order = group.argsort(stable=True)
    rank = torch.empty_like(group)
    rank[order] = (
        torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    )
    return rank


@contextmanager
def shared_prefix_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend by layouts while the context is open."""
    before = attention_of(model)
    use_layouts(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
