"""Prompts and responses as a tree of token segments in which every common start runs once.

The segments of a micro-batch, laid end to end without padding, are one sequence of N unique
tokens: a system turn that all questions share, the rest of each question, what a teacher is told,
and under each prompt its responses. Linear layers see just these N tokens, once; attention lets a
token see its own segment up to itself and the segments above.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scsdpo.policy.attention import AttentionLayout

SHORTEST_SHARED = 16
"""A common start shorter than this many tokens is not worth a level of its own."""


@dataclass(slots=True)
class _Node:
    """A segment of tokens under the path of its parents."""

    ids: Sequence[int]
    path: list["_Node"]
    """The segments above, from the root."""
    start: int = 0
    """Place of its first token in the sequence."""

    @property
    def above(self) -> int:
        """Tokens on the path above: the position of its first token."""
        return sum(len(node.ids) for node in self.path)

    @property
    def total(self) -> int:
        """Tokens on the path, its own included."""
        return self.above + len(self.ids)

    @property
    def last(self) -> int:
        """Place of its last token."""
        return self.start + len(self.ids) - 1

    @property
    def places(self) -> Tensor:
        """[len(ids)] places of its tokens."""
        return torch.arange(self.start, self.start + len(self.ids))


def prefix_tree(prompts: Sequence[tuple[int, ...]]) -> tuple[list[_Node], dict[tuple, list[_Node]]]:
    """The segments of distinct prompts, and for each prompt the path that spells it."""
    nodes: list[_Node] = []
    paths: dict[tuple, list[_Node]] = {}

    def grow(group: list[tuple[int, ...]], done: int, path: list[_Node]) -> None:
        """`group` is sorted and agrees on its first `done` tokens, which `path` spells."""
        while group:
            # As many of the following prompts as share a worthwhile start with the first.
            first, count, shared = group[0], 1, len(group[0])
            while count < len(group):
                common = _common(first, group[count], shared)
                if common - done < SHORTEST_SHARED:
                    break
                shared, count = common, count + 1
            node = _Node(ids=first[done:shared], path=path)
            nodes.append(node)
            here = [*path, node]
            longer = [prompt for prompt in group[:count] if len(prompt) > shared]
            paths.update({prompt: here for prompt in group[:count] if len(prompt) == shared})
            grow(longer, shared, here)
            group = group[count:]

    grow(sorted(set(prompts)), 0, [])
    return nodes, paths


def _common(a: tuple[int, ...], b: tuple[int, ...], most: int) -> int:
    """Length of the common start of `a` and `b`, at most `most`."""
    most = min(most, len(b))
    for i in range(most):
        if a[i] != b[i]:
            return i
    return most


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Rectangle:
    """Segments of similar size, padded to a common one for the attention kernel."""

    queries: Tensor
    """[B, q] places of their own tokens, padded with the last one."""
    inside: Tensor
    """[B, q] bool: not padding."""
    full: bool
    """There is no padding among the queries."""
    keys: Tensor
    """[B, t] places of the tokens on their paths, their own included; padded at the end."""
    known: Tensor
    """[B, t] bool: not padding."""
    causal: bool
    """No segments above: what a token sees needs no mask, for padding comes behind it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTree(AttentionLayout):
    """The unique tokens of a micro-batch, and who attends to whom."""

    ids: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int64: the position in its own prompt or response."""
    predicts: Tensor
    """[n] places whose hidden state predicts the response tokens, in row-major order."""
    rectangles: tuple[_Rectangle, ...]
    """Together they hold each token once, in the order of `ids`."""
    _visible: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        mixed = []
        for i, rectangle in enumerate(self.rectangles):
            causal = rectangle.causal and (window is None or window >= rectangle.keys.shape[1])
            attended = nn.functional.scaled_dot_product_attention(
                _pick(query, rectangle.queries),
                _pick(key, rectangle.keys),
                _pick(value, rectangle.keys),
                None if causal else self.visible(i, window),
                is_causal=causal,
                scale=1.0,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            states = attended.transpose(1, 2)
            mixed.append(states.flatten(0, 1) if rectangle.full else states[rectangle.inside])
        return torch.cat(mixed)[None]

    def visible(self, i: int, window: int | None) -> Tensor:
        """[B, 1, q, t] bool: at or before the token, on its path, within the window."""
        if (i, window) not in self._visible:
            rectangle = self.rectangles[i]
            at, of = self.positions[rectangle.queries], self.positions[rectangle.keys]
            behind = at[:, :, None] - of[:, None, :]
            seen = (behind >= 0) & rectangle.known[:, None, :]
            if window is not None:
                seen &= behind < window
            self._visible[i, window] = seen[:, None]
        return self._visible[i, window]


def _pick(states: Tensor, places: Tensor) -> Tensor:
    """[1, H, N, d] at `places` [B, s] -> [B, H, s, d]."""
    _, heads, tokens, size = states.shape
    table = states[0].transpose(0, 1).reshape(tokens, heads * size)
    # An embedding: its backward adds rows up in parallel, which indexing's does not.
    picked = nn.functional.embedding(places, table)
    return picked.view(*places.shape, heads, size).transpose(1, 2)


def token_tree(prompts: Sequence[tuple[int, ...]], ids: Tensor, mask: Tensor) -> TokenTree:
    """The tree of R responses, each under its prompt.

    A response's last token predicts nothing and is left out.

    Args:
        prompts: [R] ids, not empty.
        ids: [R, L] responses, padded on the right.
        mask: [R, L] bool.
    """
    nodes, paths = prefix_tree(prompts)
    rows = [row[:n] for row, n in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]
    leaves = [_Node(ids=row[:-1], path=paths[p]) for p, row in zip(prompts, rows, strict=True)]
    roots, inner = ([n for n in nodes if bool(n.path) is below] for below in (False, True))
    groups = [*_alike(roots), *_alike(inner), *_alike([leaf for leaf in leaves if leaf.ids])]
    ordered = [node for group in groups for node in group]
    place = 0
    for node in ordered:
        node.start = place
        place += len(node.ids)
    predicts = [
        torch.cat([torch.tensor([leaf.path[-1].last]), leaf.places])
        for leaf, row in zip(leaves, rows, strict=True)
        if row
    ]
    device = ids.device
    return TokenTree(
        ids=torch.tensor([i for node in ordered for i in node.ids], device=device),
        positions=torch.cat([torch.arange(n.above, n.above + len(n.ids)) for n in ordered]).to(
            device
        ),
        predicts=torch.cat([*predicts, torch.zeros(0, dtype=torch.long)]).to(device),
        rectangles=tuple(_rectangle(group, device) for group in groups),
    )


def _alike(nodes: Sequence[_Node]) -> list[list[_Node]]:
    """Groups of segments whose paths differ in length by less than half, longest first."""
    groups: list[list[_Node]] = []
    for node in sorted(nodes, key=lambda node: -node.total):
        if groups and groups[-1][0].total < 2 * node.total:
            groups[-1].append(node)
        else:
            groups.append([node])
    return groups


def _rectangle(nodes: Sequence[_Node], device: torch.device) -> _Rectangle:
    queries, inside = _padded([node.places for node in nodes])
    keys, known = _padded(
        [torch.cat([part.places for part in (*node.path, node)]) for node in nodes]
    )
    return _Rectangle(
        queries=queries.to(device),
        inside=inside.to(device),
        full=bool(inside.all()),
        keys=keys.to(device),
        known=known.to(device),
        causal=not any(node.path for node in nodes),
    )


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, width] of rows padded with their last entry, and where they are not padding."""
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    table = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    last = torch.stack([row[-1] for row in rows])
    return torch.where(inside, table, last[:, None]), inside
