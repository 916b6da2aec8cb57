"""One forward of the decoder over segments of tokens laid end to end, without padding.

A token sees its own segment up to itself, and whole the segments above, which run along with it or
ran before.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scsdpo.policy.layout_contract import AttentionLayout
from scsdpo.policy.segment_attention import Above, Memory, Own, SegmentAttention
from scsdpo.policy.segment_states import DeltaInputs, SegmentStates, Span
from scsdpo.policy.transfer import upload
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
        keep: whether keys, values and states are wanted afterwards (`kept`).
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        before: dict[Segment, Place],
        device: torch.device,
        *,
        keep: bool,
    ) -> None:
        starts = accumulate((len(segment.ids) for segment in segments), initial=0)
        self.starts = dict(zip(segments, starts, strict=False))
        ids = torch.tensor([token for segment in segments for token in segment.ids])
        own = {s: Own(tokens=self.span(s), position=s.position) for s in segments}
        positions = [torch.arange(len(s.ids)) + each.position for s, each in own.items()]
        self.ids, self.positions = upload([ids, torch.cat(positions)], device)
        """[N] int64 tokens, and each one's place in its own prompt and response."""
        self._attention = SegmentAttention(
            list(own.values()), list(self._levels(own, before)), device
        )
        self._before, self._keeps = before, keep
        self._kept = Kept({}, {}) if keep else None

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
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            query, key, value = (x.to(narrow) for x in (query, key, value))
        # Not `x[0]`, whose backward fills a table with zeros.
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        # Kernels take values as wide as keys; of narrower ones the rest is zero.
        width = value.shape[-1]
        if width < key.shape[-1]:
            value = nn.functional.pad(value, (0, key.shape[-1] - width))
        if self._kept is not None:
            self._kept.attention[layer] = key, value
        mixed = self._attention.attend(query, key, value, layer=layer, window=window, sinks=sinks)
        return mixed[None, ..., :width]

    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mixed, ends = self._spans.convolve(inputs[0], weight, bias, self._starts_of(layer, 0))
        if self._kept is not None:
            self._kept.states[layer] = (ends,)
        return mixed[None]

    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        flat = DeltaInputs(*(x[0] for x in inputs))
        before = self._starts_of(layer, 1)
        mixed, ends = self._spans.delta_rule(flat, before, ends=self._keeps)
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
        numbers = {segment: n for n, segment in enumerate(self.starts)}
        earlier = {above: n for n, above in enumerate(self._right_above)}
        spans = []
        for segment, start in self.starts.items():
            above = segment.path[-1] if segment.path else segment
            here = numbers[above] if segment.path and above in numbers else None
            spans.append(Span(start, len(segment.ids), above=here, earlier=earlier.get(above)))
        return SegmentStates(spans, len(self.ids), self.ids.device)

    @cached_property
    def _right_above(self) -> list[Segment]:
        """The E segments right above some of these that ran before, in the order in which they ran:
        those of one forward follow one another.
        """
        above = {segment.path[-1] for segment in self.starts if segment.path}
        return [segment for segment in self._before if segment in above - self.starts.keys()]

    @cached_property
    def _numbers(self) -> list[tuple[Mapping[int, tuple[Tensor, ...]], Tensor]]:
        """By forward that ran before, what it left and which of its segments are among those E."""
        places = [self._before[segment] for segment in self._right_above]
        by_forward = [list(of) for _, of in groupby(places, lambda place: id(place.states))]
        numbers = [torch.tensor([place.number for place in of]) for of in by_forward]
        sent = upload(numbers, self.ids.device) if numbers else []
        return [(of[0].states, index) for of, index in zip(by_forward, sent, strict=True)]

    def _starts_of(self, layer: int, which: int) -> Tensor | None:
        """[E, ...]: what those segments ended with, in a layer; None if there are none."""
        parts = [of[layer][which].index_select(0, index) for of, index in self._numbers]
        return torch.cat(parts) if parts else None

    def _levels(
        self, own: dict[Segment, Own], before: dict[Segment, Place]
    ) -> Iterator[list[Above]]:
        """By depth, the segments above some of this forward."""
        families = _families(list(own))
        for _, level in groupby(sorted(families, key=lambda s: len(s.path)), lambda s: len(s.path)):
            yield [
                Above(
                    below=tuple(own[segment] for segment in families[above]),
                    memory=None if above in own else before[above].memory,
                    keys=self.span(above) if above in own else before[above].tokens,
                    position=above.position,
                )
                for above in level
            ]


def _families(segments: Sequence[Segment]) -> dict[Segment, list[Segment]]:
    """For each segment above some of `segments`, these; they follow one another."""
    families: dict[Segment, list[Segment]] = {}
    for segment in segments:
        for above in segment.path:
            families.setdefault(above, []).append(segment)
    return families
