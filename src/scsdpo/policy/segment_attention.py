"""Attention of segments of tokens laid end to end: each to itself, then to those above it.

One call of a kernel serves the own tokens of all segments, and one call each level of the tree
above them.

An attention sink is one more set of keys, of one key with the value zero. It is merged after all
others, and the backward of every set takes the output and log-normaliser of the union.

Segments that ran in an earlier forward are there as keys and values. Their gradients do not go
through autograd, which would sum them in their own dtype: `PastKeyValues` sums them in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scsdpo.policy.partial_attention import Runs, Three, kernel
from scsdpo.policy.transfer import upload

Places = slice | Tensor
"""Rows of a table: a slice, or an index [n] int64."""


class PastKeyValues:
    """Keys and values of an earlier forward, and the sums of their gradients.

    Args:
        states: layer -> keys and values [N, K, d].
    """

    def __init__(self, states: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.states = {layer: (k.detach(), v.detach()) for layer, (k, v) in states.items()}
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, places: Places, key: Tensor, value: Tensor) -> None:
        """Add gradients [t, K, d] of keys and values at `places`, in float32 at least."""
        if layer not in self.gradients:
            wide = torch.promote_types(key.dtype, torch.float32)
            of_keys, of_values = (torch.zeros_like(x, dtype=wide) for x in self.states[layer])
            self.gradients[layer] = of_keys, of_values
        for table, gradient in zip(self.gradients[layer], (key, value), strict=True):
            _add(table, places, gradient)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Own:
    """A segment of this forward."""

    tokens: slice
    """Places of its tokens."""
    position: int
    """Position of its first token in its row."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Above:
    """A segment, and those of this forward that are below it; they follow one another."""

    below: tuple[Own, ...]
    past: PastKeyValues | None
    """Holds its keys and values; None: they are of this forward."""
    keys: slice
    """Places of its keys and values."""
    position: int
    """Position of its first token."""

    @property
    def queries(self) -> slice:
        """Places of the tokens of the segments below."""
        return slice(self.below[0].tokens.start, self.below[-1].tokens.stop)

    def beyond(self, window: int | None) -> bool:
        """True if some query is too far away to see all of the segment above."""
        if window is None:
            return False
        last = max(each.position + each.tokens.stop - each.tokens.start for each in self.below) - 1
        return last - self.position >= window

    def within(self, window: int) -> "Iterator[Above]":
        """A copy without the keys that no query sees; nothing if no key is left."""
        nearest = min(each.position for each in self.below)
        unseen = max(nearest - window + 1 - self.position, 0)
        keys = slice(self.keys.start + unseen, self.keys.stop)
        if keys.start < keys.stop:
            yield replace(self, keys=keys, position=self.position + unseen)


class _Keys(NamedTuple):
    past: PastKeyValues | None
    places: Places
    tokens: int


class _Call(NamedTuple):
    """One call of a kernel."""

    queries: Places
    keys: tuple[_Keys, ...]
    """Sets of keys; laid end to end they are the keys of the call."""
    runs: Runs


class SegmentAttention:
    """Attention of a layer: each segment to itself, then to those above.

    Args:
        own: all segments of this forward, in the order of their places.
        levels: for each level of the tree, from the roots on, the segments there.
        device: the tokens'.
    """

    def __init__(
        self, own: Sequence[Own], levels: Sequence[Sequence[Above]], device: torch.device
    ) -> None:
        self._own, self._levels, self._device = own, levels, device
        self._calls_of: dict[int | None, list[_Call]] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Queries [N, H, d], keys and values [N, K, d], sinks [H] -> [N, H, d], with gradients."""
        return _Attend.apply(query, key, value, sinks, self, layer, window)

    def _calls(self, window: int | None) -> list[_Call]:
        """The first call is of segments to themselves; the others have no key in common."""
        if window not in self._calls_of:
            longest = max(own.tokens.stop - own.tokens.start for own in self._own)
            within = window if window is not None and window < longest else None
            plans = [_Plan.own(self._own, within)]
            for level in self._levels:
                whole = [above for above in level if not above.beyond(window)]
                cut = [above for above in level if above.beyond(window)]
                seen = [a for above in cut for a in above.within(window or 0)]
                plans += [_Plan.above(whole, None)] if whole else []
                plans += [_Plan.above(seen, window)] if seen else []
            sent = iter(upload([table for plan in plans for table in plan.tables()], self._device))
            self._calls_of[window] = [plan.call(sent) for plan in plans]
        return self._calls_of[window]

    def forward(
        self, states: Three, layer: int, window: int | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries [N, H, d], keys and values [N, K, d] -> output [N, H, d] and lse [H, N]."""
        query = states[0]
        own, *above = self._calls(window)
        out, lse = kernel(query, own.runs).forward(*states, own.runs)
        if above or sinks is not None:
            out = out.to(lse.dtype)
        for call in above:
            inputs = _take(query, call.queries), *_keys(call, states, layer)
            made = kernel(query, call.runs).forward(*inputs, call.runs)
            _merge(out, lse, call.queries, *made)
        if sinks is not None:
            score = sinks.to(lse.dtype)[:, None]
            out = out * torch.sigmoid(lse - score).T[..., None]
            lse = torch.logaddexp(lse, score)
        return out.to(query.dtype), lse

    def backward(
        self,
        grad: Tensor,
        states: Three,
        outputs: tuple[Tensor, Tensor],
        layer: int,
        window: int | None,
    ) -> Three:
        """Gradients of this forward's states; those of earlier keys go to their `PastKeyValues`."""
        query, (out, lse) = states[0], outputs
        own, *above = self._calls(window)
        dq, dk, dv = kernel(query, own.runs).backward(grad, states, outputs, own.runs)
        if above:
            dq = dq.to(lse.dtype)
        if any(keys.past is None for call in above for keys in call.keys):
            dk, dv = dk.to(lse.dtype), dv.to(lse.dtype)
        for call in above:
            here, made = (_take(x, call.queries) for x in (grad, out))
            inputs = _take(query, call.queries), *_keys(call, states, layer)
            results = made, _take(lse.T, call.queries).T.contiguous()
            of_query, *of_keys = kernel(query, call.runs).backward(here, inputs, results, call.runs)
            _add(dq, call.queries, of_query)
            parts = [gradient.split([keys.tokens for keys in call.keys]) for gradient in of_keys]
            for keys, of_key, of_value in zip(call.keys, *parts, strict=True):
                if keys.past is not None:
                    keys.past.add(layer, keys.places, of_key, of_value)
                else:
                    _add(dk, keys.places, of_key)
                    _add(dv, keys.places, of_value)
        dq, dk, dv = (g.to(x.dtype) for g, x in zip((dq, dk, dv), states, strict=True))
        return dq, dk, dv


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Plan:
    """A call before its tables are on the device."""

    queries: Sequence[tuple[slice, int]]
    """(places, position of the first token) of each segment, one after the other."""
    query_runs: Sequence[int]
    """Tokens in each run of queries."""
    keys: Sequence[tuple[PastKeyValues | None, slice, int]]
    causal: bool
    window: int | None

    @staticmethod
    def own(segments: Sequence[Own], window: int | None) -> "_Plan":
        return _Plan(
            queries=[(own.tokens, own.position) for own in segments],
            query_runs=[own.tokens.stop - own.tokens.start for own in segments],
            keys=[(None, own.tokens, own.position) for own in segments],
            causal=True,
            window=window,
        )

    @staticmethod
    def above(level: Sequence[Above], window: int | None) -> "_Plan":
        return _Plan(
            queries=[(own.tokens, own.position) for above in level for own in above.below],
            query_runs=[above.queries.stop - above.queries.start for above in level],
            keys=[(above.past, above.keys, above.position) for above in level],
            causal=False,
            window=window,
        )

    def tables(self) -> Iterator[Tensor]:
        """The tables that `call` takes, in this order."""
        keys = [tokens for _, tokens, _ in self.keys]
        yield _joined(_range(tokens.start, tokens) for tokens, _ in self.queries)
        yield _joined(_range(tokens.start, tokens) for tokens in keys)
        yield _joined(_range(position, tokens) for tokens, position in self.queries)
        yield _joined(_range(position, tokens) for _, tokens, position in self.keys)
        yield torch.tensor(self._query_starts())
        yield torch.tensor(self._key_starts())

    def call(self, sent: Iterator[Tensor]) -> _Call:
        """Build the call; take its tables on the device from `sent`."""
        queries, keys, at, of, query_starts, key_starts = (next(sent) for _ in range(6))
        runs = Runs(
            queries=self._query_starts(),
            keys=self._key_starts(),
            query_starts=query_starts.int(),
            key_starts=key_starts.int(),
            at=at,
            of=of,
            causal=self.causal,
            window=self.window,
        )
        return _Call(_places([t for t, _ in self.queries], queries), self._sources(keys), runs)

    def _sources(self, index: Tensor) -> tuple[_Keys, ...]:
        """Neighbours from one source (`PastKeyValues`, or this forward) joined."""
        groups: list[tuple[PastKeyValues | None, list[slice]]] = []
        for past, tokens, _ in self.keys:
            if groups and groups[-1][0] is past:
                groups[-1][1].append(tokens)
            else:
                groups.append((past, [tokens]))
        counts = [sum(each.stop - each.start for each in tokens) for _, tokens in groups]
        indices = index.split(counts)
        return tuple(
            _Keys(past, _places(tokens, part), count)
            for (past, tokens), part, count in zip(groups, indices, counts, strict=True)
        )

    def _query_starts(self) -> list[int]:
        return list(accumulate(self.query_runs, initial=0))

    def _key_starts(self) -> list[int]:
        sizes = (tokens.stop - tokens.start for _, tokens, _ in self.keys)
        return list(accumulate(sizes, initial=0))


def _joined(ranges: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(ranges))


def _range(start: int, tokens: slice) -> Tensor:
    return torch.arange(start, start + tokens.stop - tokens.start)


def _places(tokens: Sequence[slice], index: Tensor) -> Places:
    """One slice if `tokens` follow one another, which saves copies; otherwise `index`."""
    if all(one.stop == other.start for one, other in pairwise(tokens)):
        return slice(tokens[0].start, tokens[-1].stop)
    return index


def _take(table: Tensor, places: Places) -> Tensor:
    """[N, ...] -> [n, ...]."""
    return table[places] if isinstance(places, slice) else table.index_select(0, places)


def _add(table: Tensor, places: Places, values: Tensor) -> None:
    if isinstance(places, slice):
        table[places].add_(values)
    else:
        table.index_add_(0, places, values.to(table.dtype))


def _keys(call: _Call, states: Three, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a call, [T, K, d] each."""
    parts = []
    for past, places, _ in call.keys:
        key, value = states[1:] if past is None else past.states[layer]
        parts.append((_take(key, places), _take(value, places)))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([key for key, _ in parts]), torch.cat([value for _, value in parts])


def _merge(out: Tensor, lse: Tensor, places: Places, others: Tensor, other_lse: Tensor) -> None:
    """Merge another set of keys into `out` [N, H, d] and `lse` [H, N] at `places`, in place."""
    normalizers = lse.T
    here, here_lse = _take(out, places), _take(normalizers, places)  # views if it is a slice
    share = torch.sigmoid(other_lse.T - here_lse)
    here.lerp_(others.to(out.dtype), share[..., None])
    torch.logaddexp(here_lse, other_lse.T, out=here_lse)
    if not isinstance(places, slice):
        out.index_copy_(0, places, here)
        normalizers.index_copy_(0, places, here_lse)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        attention: SegmentAttention,
        layer: int,
        window: int | None,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            out, lse = attention.forward((query, key, value), layer, window, sinks)
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.attention, ctx.layer, ctx.window = attention, layer, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *states, out, lse, sinks = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            made = ctx.attention.backward(grad, states, (out, lse), ctx.layer, ctx.window)
            of_sinks = None
            if ctx.needs_input_grad[3]:  # the gradient of a score is p (g v - <g, o>); here v = 0
                weights = (sinks.to(lse.dtype)[:, None] - lse).exp()
                share = (grad.to(lse.dtype) * out).sum(-1)
                of_sinks = -(weights * share.T).sum(-1).to(sinks.dtype)
        return (*made, of_sinks, None, None, None)
