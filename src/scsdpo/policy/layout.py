"""One forward of the decoder over segments of tokens laid end to end, without padding.

A token sees its own segment up to itself, and whole the segments above, which run along with it or
ran before.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from scsdpo.policy.attention import AttentionLayout
from scsdpo.policy.segment_attention import Above, Memory, Own, SegmentAttention
from scsdpo.policy.segment_states import SegmentStates, Span
from scsdpo.policy.tree import Segment


class Kept(NamedTuple):
    """What a forward leaves to later ones, with its graph."""

    attention: dict[int, tuple[Tensor, Tensor]]
    """By layer, keys and values [N, K, d] of N tokens."""
    states: dict[int, tuple[Tensor, ...]]
    """By layer, what S segments end with: inputs of the convolution [S, k - 1, C], and for linear
    attention the matrix [S, H, d, e], in float32 at least. A segment so takes

        layers * (k - 1) * C * bytes of an element  +  layers * H * d * e * 4

    bytes, however long it is."""


class Place(NamedTuple):
    """Where what a segment left is that ran before."""

    memory: Memory
    """Keys and values."""
    tokens: slice
    states: Mapping[int, tuple[Tensor, ...]]
    """By layer, as `Kept.states`: leaves, in which gradients add up in float32 at least."""
    number: int
    """Of the segment among those S."""


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
        self._attention = SegmentAttention(own, above, self.positions)
        self._segments, self._before, self._keeps = segments, before, keep
        self._kept = Kept({}, {}) if keep else None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            query, key, value = (x.to(narrow) for x in (query, key, value))
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if self._kept is not None:
            self._kept.attention[layer] = key, value
        return self._attention.attend(query, key, value, layer=layer, window=window)[None]

    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mixed, ends = self._spans.convolve(inputs[0], weight, bias, self._starts(layer, 0))
        if self._kept is not None:
            self._kept.states[layer] = (ends,)
        return mixed[None]

    def delta_rule(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor
    ) -> Tensor:
        inputs = (x[0] for x in (query, key, value, decay, rate))
        before = partial(self._starts, layer, 1)
        mixed, ends = self._spans.delta_rule(*inputs, before, ends=self._keeps)
        if self._kept is not None:
            self._kept.states[layer] += (ends,)
        return mixed[None]

    def kept(self) -> Kept:
        """What the forward leaves; given away once.

        A layer that is recomputed in the backward must not leave it here again: the layout is part
        of the graph, and would hold itself alive.
        """
        kept, self._kept = self._kept, None
        assert kept is not None
        return kept

    def span(self, segment: Segment) -> slice:
        """The places of its tokens."""
        return slice(self.starts[segment], self.starts[segment] + len(segment.ids))

    @cached_property
    def _spans(self) -> SegmentStates:
        """The segments, as layers that hand on a state see them."""
        numbers = {segment: n for n, segment in enumerate(self._segments)}
        earlier = {above: n for n, above in enumerate(self._above_before)}
        spans = []
        for segment in self._segments:
            above = segment.path[-1] if segment.path else None
            spans.append(
                Span(
                    self.starts[segment],
                    len(segment.ids),
                    above=numbers.get(above),
                    earlier=earlier.get(above),
                )
            )
        return SegmentStates(spans, len(self.ids), self.ids.device)

    @cached_property
    def _above_before(self) -> list[Segment]:
        """Segments right above some of these that ran before, those of a memory in one go."""
        above = {segment.path[-1] for segment in self._segments if segment.path}
        # By the order in which they ran.
        return [segment for segment in self._before if segment in above - self.starts.keys()]

    def _starts(self, layer: int, which: int) -> Tensor | None:
        """[E, ...] what the segments `_above_before` ended with, in a layer."""
        parts: dict[int, tuple[Tensor, list[int]]] = {}
        for segment in self._above_before:
            place = self._before[segment]
            table = place.states[layer][which]
            parts.setdefault(id(table), (table, []))[1].append(place.number)
        if not parts:
            return None
        return torch.cat(
            [t.index_select(0, torch.tensor(n, device=t.device)) for t, n in parts.values()]
        )

    def _own(self, segments: Sequence[Segment], device: torch.device) -> Own:
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
        return Own(
            padded=padded.to(device),
            real=real.to(device),
            places=places.to(device),
            whole=slice(first, first + len(places)) if whole else None,
        )

    def _above(
        self, segment: Segment, below: Sequence[Segment], before: dict[Segment, Place]
    ) -> Above:
        here = segment in self.starts
        memory, keys = (None, self.span(segment)) if here else before[segment][:2]
        return Above(
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
