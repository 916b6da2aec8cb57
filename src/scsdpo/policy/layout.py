"""One forward of the decoder over segments of tokens laid end to end, without padding.

A token attends to the tokens before it in its own segment, and to all tokens of the segments above.
These run in the same forward, or ran in an earlier one.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scsdpo.policy.layout_contract import AttentionLayout
from scsdpo.policy.segment_attention import Above, Own, PastKeyValues, SegmentAttention
from scsdpo.policy.segment_states import DeltaInputs, SegmentStates, Span
from scsdpo.policy.transfer import upload
from scsdpo.policy.tree import Segment


class Kept(NamedTuple):
    """Keys, values and states that a forward leaves for later forwards; they carry its graph."""

    attention: dict[int, tuple[Tensor, Tensor]]
    """Layer -> keys and values [N, K, d] of N tokens."""
    states: dict[int, tuple[Tensor, ...]]
    """Layer -> the state after each of S segments: the last inputs of its convolution
    [S, k - 1, C], and for linear attention its matrix [S, H, d, e], in float32 at least. The states
    of a segment take

        layers * (k - 1) * C * bytes of an element  +  layers * H * d * e * 4

    bytes, however long it is."""


class PastSegment(NamedTuple):
    """Where to find the keys, values and states of a segment that ran in an earlier forward."""

    keys: PastKeyValues
    """Keys and values of all tokens of that forward."""
    tokens: slice
    """Rows of `keys` that belong to the segment."""
    states: Mapping[int, tuple[Tensor, ...]]
    """Layer -> the states as in `Kept.states`. They are leaves, in which gradients are summed in
    float32 at least."""
    number: int
    """Row of `states` that belongs to the segment."""


class PackedSegments(AttentionLayout):
    """The layout of N tokens of segments: each token's place, and which tokens it attends to.

    Args:
        segments: depth first, each after those above it; together not empty.
        before: the segments above that ran in an earlier forward.
        device: the model's.
        keep: keep keys, values and states for later forwards (`kept`).
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        before: dict[Segment, PastSegment],
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
        """[N] int64: token ids, and the position of each token in its own row."""
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
        # `x[0]` would fill a table with zeros in its backward.
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        # Kernels need values as wide as keys: narrower ones are padded with zeros.
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
        """Return what the forward kept, once, and forget it.

        The layout is part of the graph. If it held what a layer recomputes in the backward, it
        would keep itself alive.
        """
        kept, self._kept = self._kept, None
        assert kept is not None
        return kept

    def span(self, segment: Segment) -> slice:
        """The places of the segment's tokens."""
        return slice(self.starts[segment], self.starts[segment] + len(segment.ids))

    @cached_property
    def _spans(self) -> SegmentStates:
        """The segments for layers that carry a state from token to token."""
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
        """The E parents of these segments that ran earlier, in the order in which they ran.

        Parents that ran in one forward follow one another.
        """
        above = {segment.path[-1] for segment in self.starts if segment.path}
        return [segment for segment in self._before if segment in above - self.starts.keys()]

    @cached_property
    def _numbers(self) -> list[tuple[Mapping[int, tuple[Tensor, ...]], Tensor]]:
        """For each earlier forward, its states and the rows of them that belong to those E."""
        places = [self._before[segment] for segment in self._right_above]
        by_forward = [list(of) for _, of in groupby(places, lambda place: id(place.states))]
        numbers = [torch.tensor([place.number for place in of]) for of in by_forward]
        sent = upload(numbers, self.ids.device) if numbers else []
        return [(of[0].states, index) for of, index in zip(by_forward, sent, strict=True)]

    def _starts_of(self, layer: int, which: int) -> Tensor | None:
        """[E, ...]: states of a layer after those E segments; None if E = 0."""
        parts = [of[layer][which].index_select(0, index) for of, index in self._numbers]
        return torch.cat(parts) if parts else None

    def _levels(
        self, own: dict[Segment, Own], before: dict[Segment, PastSegment]
    ) -> Iterator[list[Above]]:
        """For each depth, the segments there that are above some segment of this forward."""
        below: dict[Segment, list[Own]] = {}  # these follow one another
        for segment, each in own.items():
            for above in segment.path:
                below.setdefault(above, []).append(each)
        for _, level in groupby(sorted(below, key=lambda s: len(s.path)), lambda s: len(s.path)):
            yield [
                Above(
                    below=tuple(below[above]),
                    past=None if above in own else before[above].keys,
                    keys=self.span(above) if above in own else before[above].tokens,
                    position=above.position,
                )
                for above in level
            ]
