"""One forward of the decoder over segments of tokens laid end to end, without padding.

A token sees its own segment up to itself, and whole the segments above, which run along with it or
ran before. Of those that ran before there are keys and values, and the gradients that are sent
back to them add up beside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scsdpo.policy.attention import AttentionLayout
from scsdpo.policy.partial_attention import Seen, Three, kernel
from scsdpo.policy.tree import Segment


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


class Place(NamedTuple):
    """Where the keys and values of a segment that ran before are."""

    memory: Memory
    tokens: slice


class PackedSegments(AttentionLayout):
    """N tokens of segments, and who of them attends to whom.

    Args:
        segments: each after those above it, subtrees in one go; together not empty.
        before: the segments above that ran in an earlier forward.
        device: of the model.
        keep: whether keys and values are wanted afterwards (`states`).
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        before: dict[Segment, Place],
        device: torch.device,
        *,
        keep: bool,
    ) -> None:
        self.starts: dict[Segment, int] = {}
        place = 0
        ids: list[int] = []
        positions: list[Tensor] = []
        for segment in segments:
            self.starts[segment] = place
            place += len(segment.ids)
            ids.extend(segment.ids)
            positions.append(torch.arange(len(segment.ids)) + segment.position)
        self.ids = torch.tensor(ids, device=device)
        """[N] int64."""
        self.positions = torch.cat(positions).to(device)
        """[N] int64: in its own prompt and response."""
        own = [self._own(group, device) for group in _alike(segments)]
        above = [
            self._above(segment, below, before) for segment, below in _families(segments).items()
        ]
        self._attention = _Attention(own, above, self.positions)
        self._states: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            query, key, value = (x.to(narrow) for x in (query, key, value))
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if self._states is not None:
            self._states[layer] = key, value
        return _Attend.apply(query, key, value, self._attention, layer, window)[None]

    def states(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Per layer keys and values [N, K, d], with their graph; given away once.

        A layer that is recomputed in the backward must not leave them here again: the layout is
        part of the graph, and would hold itself alive.
        """
        states, self._states = self._states, None
        assert states is not None
        return states

    def span(self, segment: Segment) -> slice:
        """The places of its tokens."""
        return slice(self.starts[segment], self.starts[segment] + len(segment.ids))

    def _own(self, segments: Sequence[Segment], device: torch.device) -> "_Own":
        longest = max(len(segment.ids) for segment in segments)
        steps = torch.arange(longest)
        lengths = torch.tensor([len(segment.ids) for segment in segments])[:, None]
        starts = torch.tensor([self.starts[segment] for segment in segments])[:, None]
        padded = starts + torch.minimum(steps, lengths - 1)
        real = (steps < lengths).flatten().nonzero()[:, 0]
        places = padded.flatten()[real]
        first = int(places[0])
        whole = len(places) == padded.numel() and bool(
            (places == first + torch.arange(len(places))).all()
        )
        return _Own(
            padded=padded.to(device),
            real=real.to(device),
            places=places.to(device),
            whole=slice(first, first + len(places)) if whole else None,
        )

    def _above(
        self, segment: Segment, below: Sequence[Segment], before: dict[Segment, Place]
    ) -> "_Above":
        here = segment in self.starts
        memory, keys = (None, self.span(segment)) if here else before[segment]
        return _Above(
            queries=slice(self.starts[below[0]], self.span(below[-1]).stop),
            memory=memory,
            keys=keys,
            position=segment.position,
            nearest=min(each.position for each in below),
            farthest=max(each.position + len(each.ids) for each in below) - 1,
        )


def _families(segments: Sequence[Segment]) -> dict[Segment, list[Segment]]:
    """For each segment above some of `segments`, these; they follow one another."""
    families: dict[Segment, list[Segment]] = {}
    for segment in segments:
        for above in segment.path:
            families.setdefault(above, []).append(segment)
    return families


def _alike(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Groups of segments that differ in length by a quarter at most, or little, longest first."""
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda segment: -len(segment.ids)):
        if groups and 3 * len(groups[-1][0].ids) <= 4 * len(segment.ids) + 48:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Own:
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
class _Above:
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


class _Attention:
    """Attention of a layer: each segment to itself, then to those above."""

    def __init__(self, own: Sequence[_Own], above: Sequence[_Above], positions: Tensor) -> None:
        self._groups, self._above, self._positions = own, above, positions
        self._windows: dict[int | None, tuple[list[tuple[_Own, Seen]], list[_Part]]] = {}

    def parts(self, window: int | None) -> tuple[list[tuple[_Own, Seen]], list[_Part]]:
        """What is seen within segments, and of segments above."""
        if window not in self._windows:
            own = [(group, _within(group.padded, window)) for group in self._groups]
            above = [self._part(each, window) for each in self._above]
            self._windows[window] = own, [part for part in above if part is not None]
        return self._windows[window]

    def _part(self, above: _Above, window: int | None) -> _Part | None:
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
        own, above = self.parts(window)
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
        own, above = self.parts(window)
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
        attention: _Attention,
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
