"""One forward of the decoder over segments of tokens laid end to end, without padding.

A token sees its own segment up to itself, and whole the segments above, which run along with it or
ran before.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from scsdpo.policy.attention import AttentionLayout
from scsdpo.policy.segment_attention import Above, Memory, Own, SegmentAttention
from scsdpo.policy.transfer import upload
from scsdpo.policy.tree import Segment


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
        self._states: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        kind = query.device.type
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            query, key, value = (x.to(narrow) for x in (query, key, value))
        # Not `x[0]`, whose backward fills a table with zeros.
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if self._states is not None:
            self._states[layer] = key, value
        return self._attention.attend(query, key, value, layer=layer, window=window)[None]

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
