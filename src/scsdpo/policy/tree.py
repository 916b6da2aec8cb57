"""Prompts as a tree of token segments in which every common start is one segment.

For example a system turn that all questions share is the root. Below it stands the rest of each
question, then what only the teacher reads, and below each prompt its responses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SHORTEST_SHARED = 48
"""A common start of fewer tokens gets no level of its own, because each level is one more call of
attention in every layer. With 16 a step of 32 questions has five levels instead of three, and runs
only 1 % fewer tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Tokens that follow the tokens of the segments above."""

    ids: tuple[int, ...]
    path: tuple["Segment", ...] = ()
    """The segments above, from the root on."""
    below: list["Segment"] = field(default_factory=list)
    """The children."""

    @property
    def position(self) -> int:
        """Position of its first token: the number of tokens above."""
        return sum(len(segment.ids) for segment in self.path)

    @property
    def line(self) -> tuple["Segment", ...]:
        """The segments above and the segment itself."""
        return (*self.path, self)

    def walk(self) -> Iterator["Segment"]:
        """The segment itself, then all below it, depth first."""
        yield self
        for child in self.below:
            yield from child.walk()

    def tokens(self) -> int:
        """Number of tokens in the segment and all below it."""
        return sum(len(segment.ids) for segment in self.walk())


def prefix_tree(
    prompts: Sequence[tuple[int, ...]], longest: int
) -> tuple[list[Segment], dict[tuple[int, ...], Segment]]:
    """Build the tree of the distinct prompts.

    Args:
        prompts: token ids; no prompt may be empty.
        longest: most tokens of a segment; a longer one is cut into a chain.

    Returns:
        The roots, and for each prompt the segment in which it ends.
    """
    roots: list[Segment] = []
    ends: dict[tuple[int, ...], Segment] = {}

    def grow(group: list[tuple[int, ...]], done: int, above: Segment | None) -> None:
        """Add `group` below `above`: sorted prompts that share their first `done` tokens."""
        while group:
            # Count the following prompts that share a long enough start with the first.
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
    """Depth first: each segment stands after those above it."""
    kept: bool
    """True: its graph is kept until its responses are done. False: the forward then runs again."""
    room: int
    """Tokens of responses that fit in the budget beside the graphs that are kept at that time."""


def pieces(siblings: Sequence[Segment], room: int) -> Iterator[Piece]:
    """Cut subtrees into pieces; each piece comes after the pieces above it.

    Subtrees that together have up to half of `room` tokens form one piece. The root of a larger
    subtree is a piece of its own. Its graph is kept if that leaves a quarter of the room for
    responses.

    Args:
        siblings: roots of the subtrees.
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
