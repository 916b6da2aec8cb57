"""Attention of segments of tokens laid end to end: each to itself, then to those above it.

What ran in an earlier forward is there as keys and values. The gradients that are sent back to
them do not go through autograd, which would sum them in their dtype: they add up beside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scsdpo.policy.partial_attention import Seen, Three, kernel


class Memory:
    """Keys and values of a forward that ran, and the sums of the gradients sent back to them.

    Args:
        states: per layer keys and values [N, K, d].
    """

    def __init__(self, states: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.states = {layer: (k.detach(), v.detach()) for layer, (k, v) in states.items()}
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, places: slice, key: Tensor, value: Tensor) -> None:
        """Gradients [t, K, d] of keys and values at `places`; summed in float32 at least."""
        if layer not in self.gradients:
            wide = torch.promote_types(key.dtype, torch.float32)
            of_keys, of_values = (torch.zeros_like(x, dtype=wide) for x in self.states[layer])
            self.gradients[layer] = of_keys, of_values
        for table, gradient in zip(self.gradients[layer], (key, value), strict=True):
            table[places] += gradient


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Own:
    """Segments of similar length, padded to a common one; each token sees back to its start."""

    padded: Tensor
    """[B, s] places of their tokens, padded with the last one: no other looks that far ahead."""
    real: Tensor
    """[n] which of the B * s are no padding."""
    places: Tensor
    """[n] their places."""
    whole: slice | None
    """The places, if nothing is padding and nothing lies between them: no copies then."""

    def take(self, rows: Tensor) -> Tensor:
        """[N, H, ...] -> [B, H, s, ...]."""
        shape = (*self.padded.shape, *rows.shape[1:])
        if self.whole is not None:
            return rows[self.whole].view(shape).transpose(1, 2)
        return rows.index_select(0, self.padded.flatten()).view(shape).transpose(1, 2)

    def take_gradient(self, rows: Tensor) -> Tensor:
        """As `take`, but 0 at the padding, from where no gradient comes."""
        if self.whole is not None:
            return self.take(rows)
        table = rows.new_zeros((self.padded.numel(), *rows.shape[1:]))
        table[self.real] = rows.index_select(0, self.places)
        return table.view(*self.padded.shape, *rows.shape[1:]).transpose(1, 2)

    def put(self, table: Tensor, values: Tensor) -> None:
        """[B, H, s, ...] into [N, H, ...]."""
        flat = values.transpose(1, 2).flatten(0, 1)
        if self.whole is not None:
            table[self.whole] = flat
        else:
            table[self.places] = flat.index_select(0, self.real).to(table.dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Above:
    """Queries that follow one another, and a segment that all of them have above."""

    queries: slice
    memory: Memory | None
    """Of its keys and values; None: they are of this forward."""
    keys: slice
    """Their places."""
    position: int
    """Of its first token."""
    nearest: int
    """Smallest position of a query."""
    farthest: int
    """Largest."""


class _Part(NamedTuple):
    """Of a layer's attention: queries and the keys that they see, as far as the window goes."""

    queries: slice
    memory: Memory | None
    keys: slice
    seen: Seen


class SegmentAttention:
    """Attention of a layer: each segment to itself, then to those above."""

    def __init__(self, own: Sequence[Own], above: Sequence[Above], positions: Tensor) -> None:
        self._groups, self._above, self._positions = own, above, positions
        self._windows: dict[int | None, tuple[list[tuple[Own, Seen]], list[_Part]]] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: int | None
    ) -> Tensor:
        """Queries [N, H, d], keys and values [N, K, d] -> [N, H, d], with a gradient."""
        return _Attend.apply(query, key, value, self, layer, window)

    def _parts(self, window: int | None) -> tuple[list[tuple[Own, Seen]], list[_Part]]:
        """What is seen within segments, and of segments above."""
        if window not in self._windows:
            own = [(group, _within(group.padded, window)) for group in self._groups]
            above = [self._part(each, window) for each in self._above]
            self._windows[window] = own, [part for part in above if part is not None]
        return self._windows[window]

    def _part(self, above: Above, window: int | None) -> _Part | None:
        if window is None or above.farthest - above.position < window:
            return _Part(above.queries, above.memory, above.keys, False)
        # No query sees what lies a window before the nearest of them.
        unseen = max(above.nearest - window + 1 - above.position, 0)
        keys = slice(above.keys.start + unseen, above.keys.stop)
        if keys.start >= keys.stop:
            return None
        at = self._positions[above.queries]
        of = torch.arange(keys.stop - keys.start, device=at.device) + above.position + unseen
        return _Part(above.queries, above.memory, keys, (at[:, None] - of < window)[None])

    def forward(self, states: Three, layer: int, window: int | None) -> tuple[Tensor, Tensor]:
        """Queries [N, H, d], keys and values [N, K, d] -> output [N, H, d] and lse [N, H]."""
        query = states[0]
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty(query.shape, dtype=wide, device=query.device)
        lse = torch.empty(query.shape[:2], dtype=wide, device=query.device)
        own, above = self._parts(window)
        for group, seen in own:
            made = kernel(query.device, seen).forward(*_three(group.take, states), seen)
            group.put(out, made[0])
            group.put(lse, made[1])
        for part in above:
            keys = _keys(part, states, layer)
            made = kernel(query.device, part.seen).forward(
                _heads_first(query[part.queries]), *keys, part.seen
            )
            _merge(out[part.queries], lse[part.queries], *map(_tokens_first, made))
        return out.to(query.dtype), lse

    def backward(
        self,
        grad: Tensor,
        states: Three,
        outputs: tuple[Tensor, Tensor],
        layer: int,
        window: int | None,
    ) -> Three:
        """Of this forward's states; the gradients of earlier ones go to their memories."""
        query, wide = states[0], torch.promote_types(grad.dtype, torch.float32)
        tables = [torch.empty(x.shape, dtype=wide, device=x.device) for x in states]
        own, above = self._parts(window)
        for group, seen in own:
            inputs = _three(group.take, states)
            results = group.take(outputs[0]), group.take(outputs[1])
            here = group.take_gradient(grad)
            made = kernel(grad.device, seen).backward(here, inputs, results, seen)
            for table, gradient in zip(tables, made, strict=True):
                group.put(table, gradient)
        for part in above:
            inputs = _heads_first(query[part.queries]), *_keys(part, states, layer)
            here, out, lse = (_heads_first(x[part.queries]) for x in (grad, *outputs))
            made = kernel(grad.device, part.seen).backward(here, inputs, (out, lse), part.seen)
            of_query, *of_keys = map(_tokens_first, made)
            tables[0][part.queries] += of_query
            if part.memory is not None:
                part.memory.add(layer, part.keys, *of_keys)
                continue
            for table, gradient in zip(tables[1:], of_keys, strict=True):
                table[part.keys] += gradient
        dq, dk, dv = (table.to(x.dtype) for table, x in zip(tables, states, strict=True))
        return dq, dk, dv


def _within(padded: Tensor, window: int | None) -> Seen:
    """Every token sees back to its segment's start, or as far as the window goes."""
    length = padded.shape[1]
    if window is None or window >= length:
        return True
    ones = torch.ones(1, length, length, dtype=torch.bool, device=padded.device)
    return ones.tril() & ones.triu(1 - window)


def _keys(part: _Part, states: Three, layer: int) -> tuple[Tensor, Tensor]:
    """[1, K, t, d] twice."""
    key, value = states[1:] if part.memory is None else part.memory.states[layer]
    return _heads_first(key[part.keys]), _heads_first(value[part.keys])


def _three(change: Callable[[Tensor], Tensor], tensors: Three) -> Three:
    return change(tensors[0]), change(tensors[1]), change(tensors[2])


def _heads_first(rows: Tensor) -> Tensor:
    """[n, H, ...] -> [1, H, n, ...]."""
    return rows.transpose(0, 1)[None]


def _tokens_first(rows: Tensor) -> Tensor:
    """[1, H, n, ...] -> [n, H, ...]."""
    return rows[0].transpose(0, 1)


def _merge(out: Tensor, lse: Tensor, others: Tensor, other_lse: Tensor) -> None:
    """Make `out` [n, H, d] and `lse` [n, H] those of the union of two sets of keys, in place."""
    union = torch.logaddexp(lse, other_lse)
    out.mul_((lse - union).exp_()[..., None])
    out.addcmul_(others.to(out.dtype), (other_lse - union).exp_()[..., None])
    lse.copy_(union)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention: SegmentAttention,
        layer: int,
        window: int | None,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            out, lse = attention.forward((query, key, value), layer, window)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.attention, ctx.layer, ctx.window = attention, layer, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *states, out, lse = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            made = ctx.attention.backward(grad, states, (out, lse), ctx.layer, ctx.window)
        return (*made, None, None, None)
