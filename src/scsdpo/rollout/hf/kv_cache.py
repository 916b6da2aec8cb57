"""Keys and values of the prompts and responses in flight, held by actual length.

Responses of similar length share a bucket, a rectangle as wide as its longest; a response that
outgrows its bucket moves to the next. So a straggler widens nobody else's rectangle, a batched
matrix product reads few dead places, and memory follows what is held, not `max_new_tokens`.

Shapes: S slots of a table, t its width in tokens, K key/value heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Tokens by which rectangles grow; the width of the first bucket."""
_RATIO = 4
"""Each bucket's limit over that of the one before: few buckets, for each costs kernels."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a rectangle."""

    slots: int = 0
    """Sequences."""
    width: int = 0
    """Tokens of each."""

    @property
    def tokens(self) -> int:
        """Places for keys and values, a layer."""
        return self.slots * self.width

    def roomy(self, need: "Size", limit: int) -> "Size":
        """The old size if it serves `need` without much waste, else `need` and room to grow in.

        Growing by a share copies each token a bounded number of times.
        """
        if need.tokens == 0:
            return Size()
        slots, width = self.slots, self.width
        if not need.slots <= slots <= 2 * need.slots:
            slots = need.slots + need.slots // 4
        if need.width > width:
            width = min(blocks(need.width + (need.width // 2 if width else 0)), limit)
        return Size(slots, width)


def blocks(tokens: int) -> int:
    """`tokens`, rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Move:
    """Copies whole sequences from one bucket to another, or within one."""

    origin: int
    """Bucket."""
    target: int
    """Bucket."""
    sources: Tensor
    """[m] slots of `origin`."""
    targets: Tensor
    """[m] slots of `target`."""


class Table:
    """One layer's keys and values of one rectangle.

    A sliding layer keeps its window only: place c % window of a response holds token c, and a
    prompt's last `window` tokens stand at the left. Zeros where nothing was written: a masked
    place must not hold NaN.
    """

    def __init__(self, key: Tensor, value: Tensor, window: int | None, size: Size) -> None:
        self.window = window
        # Under autocast a key norm gives float32 keys; the update attends to rounded ones too.
        self.keys = value.new_zeros(0, key.shape[1], 0, key.shape[3])
        self.values = value.new_zeros(0, value.shape[1], 0, value.shape[3])
        self.resize(size)

    def resize(self, size: Size) -> None:
        """Make it `size`, keeping what both have room for."""
        width = size.width if self.window is None else min(size.width, self.window)
        self.keys = _resized(self.keys, size.slots, width)
        self.values = _resized(self.values, size.slots, width)

    def copy(self, origin: "Table", sources: Tensor, targets: Tensor) -> None:
        """Copy the sequences `sources` of `origin` over the slots `targets`."""
        tokens = min(self.keys.shape[2], origin.keys.shape[2])
        self.keys[targets, :, :tokens] = origin.keys[sources, :, :tokens]
        self.values[targets, :, :tokens] = origin.values[sources, :, :tokens]


def _resized(table: Tensor, slots: int, width: int) -> Tensor:
    if table.shape[0] == slots and table.shape[2] == width:
        return table
    new = table.new_zeros(slots, table.shape[1], width, table.shape[3])
    slots, width = min(slots, table.shape[0]), min(width, table.shape[2])
    new[:slots, :, :width] = table[:slots, :, :width]
    return new


class LayerCache:
    """One layer's tables."""

    def __init__(self, prompts: Table, buckets: list[Table]) -> None:
        self.prompts = prompts
        self.buckets = buckets


class StateCache:
    """What layers without keys and values end with, after prompts and after responses so far.

    A sequence takes as much as `scsdpo.policy.layout.Kept.states` says, however long it is. Those
    of responses stand in the order in which these run.
    """

    def __init__(self) -> None:
        self.prompts: dict[int, list[Tensor]] = {}
        """By layer, states [P, ...] by slot."""
        self.rows: dict[int, list[Tensor]] = {}
        """By layer, states [R, ...]."""
        self.read = torch.zeros(0, dtype=torch.long)
        """[R] tokens of each response that its states have read."""
        self.fresh = self.read.bool()
        """[R] the token of this step is one more; a response that waits reads its last one again,
        which must not change its states."""

    def keep(self, layer: int, which: int, ends: Tensor) -> None:
        """Append the states `which` of new prompts [p, ...]."""
        states = self.prompts.setdefault(layer, [])
        if which == len(states):
            states.append(ends)
        else:
            states[which] = torch.cat([states[which], ends])

    def keep_prompts(self, slots: Sequence[int]) -> None:
        """Close the gaps between the prompts in `slots`."""
        self.prompts = {n: [x[[*slots]] for x in states] for n, states in self.prompts.items()}

    def start(self, slots: Tensor) -> None:
        """Append rows that go on from the prompts in `slots`."""
        self.read = torch.cat([self.read.to(slots.device), torch.zeros_like(slots)])
        for layer, states in self.prompts.items():
            new = [x[slots] for x in states]
            old = self.rows.get(layer)
            self.rows[layer] = [torch.cat(x) for x in zip(old, new, strict=True)] if old else new

    def order(self, rows: Tensor) -> None:
        """Let only `rows` go on, in this order."""
        self.read = self.read[rows]
        self.rows = {n: [x[rows] for x in states] for n, states in self.rows.items()}

    def at(self, columns: Tensor) -> None:
        """Each row reads the token of its response at the place `columns` [R]."""
        self.fresh = columns >= self.read
        self.read = columns + 1


class KVCache:
    """Every layer's prompts and buckets of responses; layers are made when first asked for.

    Args:
        max_tokens: room, in tokens; sizes that need more get no room to grow in.
        longest: most tokens of a response that are ever held.
    """

    def __init__(self, *, max_tokens: int, longest: int) -> None:
        self.max_tokens = max_tokens
        self.limits = [BLOCK]
        while self.limits[-1] < longest:
            self.limits.append(self.limits[-1] * _RATIO)
        self.limits[-1] = max(longest, 1)
        """Tokens of a response that each bucket has room for."""
        self.prompts = Size()
        self.buckets = [Size() for _ in self.limits]
        self.layers: dict[int, LayerCache] = {}
        self.states = StateCache()
        """Of the layers that have other states."""

    def layer(self, index: int, key: Tensor, value: Tensor, window: int | None) -> LayerCache:
        """The tables of layer `index`, made to fit `key` and `value`."""
        if index not in self.layers:
            self.layers[index] = LayerCache(
                Table(key, value, window, self.prompts),
                [Table(key, value, window, size) for size in self.buckets],
            )
        return self.layers[index]

    @property
    def tokens(self) -> int:
        """Places held, a layer."""
        return self.prompts.tokens + sum(size.tokens for size in self.buckets)

    def bucket_of(self, tokens: int) -> int:
        """The bucket of a response that holds so many tokens."""
        return next(b for b, limit in enumerate(self.limits) if tokens <= limit)

    def keep_prompts(self, slots: Sequence[int]) -> None:
        """Close the gaps between the prompts in `slots`, which keep their order."""
        self.states.keep_prompts(slots)
        for layer in self.layers.values():
            index = torch.tensor(slots, dtype=torch.long, device=layer.prompts.keys.device)
            layer.prompts.keys = layer.prompts.keys[index]
            layer.prompts.values = layer.prompts.values[index]
        self.prompts = Size(len(slots), self.prompts.width)

    def fit(self, prompts: Size, buckets: Sequence[Size], moves: Sequence[Move] = ()) -> None:
        """Make `moves`, in their order, on the way to sizes that serve `prompts` and `buckets`.

        One layer is in two sizes at a time, so that little more than the larger is ever held.
        """
        limits = zip(self.buckets, buckets, self.limits, strict=True)
        roomy = [size.roomy(need, limit) for size, need, limit in limits]
        roomy_prompts = self.prompts.roomy(prompts, prompts.width)
        if roomy_prompts.tokens + sum(size.tokens for size in roomy) > self.max_tokens:
            roomy_prompts, roomy = prompts, list(buckets)
        largest = [
            Size(max(old.slots, new.slots), max(old.width, new.width))
            for old, new in zip(self.buckets, roomy, strict=True)
        ]
        for layer in self.layers.values():
            layer.prompts.resize(roomy_prompts)
            for table, size in zip(layer.buckets, largest, strict=True):
                table.resize(size)
            for move in moves:
                origin = layer.buckets[move.origin]
                layer.buckets[move.target].copy(origin, move.sources, move.targets)
            for table, size in zip(layer.buckets, roomy, strict=True):
                table.resize(size)
        self.prompts, self.buckets = roomy_prompts, roomy
