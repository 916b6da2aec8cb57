"""Prompts as a tree of token segments in which every common start is one segment.

A system turn that all questions share, the rest of each question, what a teacher is told, and
under each prompt its responses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SHORTEST_SHARED = 48
"""A common start shorter than this many tokens is not worth a level of its own, which is one more
call of attention in every layer: with 16 a step of 32 questions has five levels in place of three,
and runs 1 % fewer tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tokens under the path of the segments above."""

    ids: tuple[int, ...]
    path: tuple["Segment", ...] = ()
    """From the root."""
    below: list["Segment"] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of its first token: how many tokens are above."""
        return sum(len(segment.ids) for segment in self.path)

    @property
    def line(self) -> tuple["Segment", ...]:
        """The path and the segment itself."""
        return (*self.path, self)

    def walk(self) -> Iterator["Segment"]:
        """Itself, then what is below it, each subtree in one go."""
        yield self
        for child in self.below:
            yield from child.walk()

    def tokens(self) -> int:
        """In it and below."""
        return sum(len(segment.ids) for segment in self.walk())


def prefix_tree(
    prompts: Sequence[tuple[int, ...]], longest: int
) -> tuple[list[Segment], dict[tuple[int, ...], Segment]]:
    """The roots of the tree that distinct prompts make, and the segment in which each ends.

    Args:
        prompts: ids; none is empty.
        longest: a segment of more tokens is cut into a chain.
    """
    roots: list[Segment] = []
    ends: dict[tuple[int, ...], Segment] = {}

    def grow(group: list[tuple[int, ...]], done: int, above: Segment | None) -> None:
        """`group` is sorted and agrees on its first `done` tokens, which `above` ends."""
        while group:
            # As many of the following prompts as share a worthwhile start with the first.
            first, count, shared = group[0], 1, len(group[0])
            while count < len(group):
                common = _common(first, group[count], shared)
                if common - done < SHORTEST_SHARED:
                    break
                shared, count = common, count + 1
            here = above
            for start in range(done, shared, longest):
                ids = first[start : min(start + longest, shared)]
                segment = Segment(ids, here.line if here else ())
                (here.below if here else roots).append(segment)
                here = segment
            assert here is not None
            ends.update({prompt: here for prompt in group[:count] if len(prompt) == shared})
            grow([prompt for prompt in group[:count] if len(prompt) > shared], shared, here)
            group = group[count:]

    grow(sorted(set(prompts)), 0, None)
    return roots, ends


def _common(a: tuple[int, ...], b: tuple[int, ...], most: int) -> int:
    """Length of the common start of `a` and `b`, at most `most`."""
    most = min(most, len(b))
    for i in range(most):
        if a[i] != b[i]:
            return i
    return most


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """Segments that run in one forward."""

    segments: tuple[Segment, ...]
    """Each after those above it, subtrees in one go."""
    kept: bool
    """Its graph is kept until its responses are done; otherwise the forward is repeated then."""
    room: int
    """Tokens of responses that fit the budget beside the graphs that are kept at that time."""


def pieces(siblings: Sequence[Segment], room: int) -> Iterator[Piece]:
    """Subtrees in pieces, each after the pieces above it.

    Subtrees of up to half the room go together. The root of a larger one goes alone, and its
    graph is kept if that leaves a quarter of the room for responses.

    Args:
        siblings: the subtrees' roots.
        room: tokens whose activations fit in memory.
    """
    together: list[Segment] = []
    total = 0
    for root in siblings:
        size = root.tokens()
        if together and total + size > room // 2:
            yield _piece([s for each in together for s in each.walk()], room)
            together, total = [], 0
        if size <= room // 2 or not root.below:
            together.append(root)
            total += size
        else:
            alone = _piece([root], room)
            yield alone
            yield from pieces(root.below, alone.room)
    if together:
        yield _piece([s for each in together for s in each.walk()], room)


def _piece(segments: Sequence[Segment], room: int) -> Piece:
    size = sum(len(segment.ids) for segment in segments)
    kept = size <= room * 3 // 4
    return Piece(segments=tuple(segments), kept=kept, room=room - size if kept else room)
