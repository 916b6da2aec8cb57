"""Keys and values of the prompts and responses in flight, held by actual length.

Responses of similar length share a bucket, a rectangle as wide as its longest. A response that
outgrows its bucket moves to the next. So a long response does not widen the rectangle of short
ones, a batched matrix product reads few empty places, and memory follows the tokens that are held,
not `max_new_tokens`.

Shapes: S slots of a table, t its width in tokens, K key/value heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Tokens by which rectangles grow; also the width of the first bucket."""
_RATIO = 4
"""Ratio of the limits of neighbouring buckets. It is large, because each bucket costs kernels."""


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a rectangle."""

    slots: int = 0
    """Number of sequences."""
    width: int = 0
    """Tokens of each sequence."""

    @property
    def tokens(self) -> int:
        """Number of places for keys and values in each layer."""
        return self.slots * self.width

    def roomy(self, need: "Size", limit: int) -> "Size":
        """Keep the size if `need` fits in it without much waste, else give `need` with spare room.

        Spare room in proportion to the size bounds the number of times that a token is copied.
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
    """`tokens` rounded up to a multiple of `BLOCK`."""
    return -(-tokens // BLOCK) * BLOCK


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Move:
    """A copy of whole sequences from one bucket to another, or within one."""

    origin: int
    """Number of the bucket that is read."""
    target: int
    """Number of the bucket that is written."""
    sources: Tensor
    """[m] slots of `origin`."""
    targets: Tensor
    """[m] slots of `target`."""


class KVTable:
    """One layer's keys and values of one rectangle.

    A sliding layer keeps its window only: place c % window of a response holds token c, and a
    prompt's last `window` tokens stand at the left. Unwritten places hold zeros, because a masked
    place must not hold nan.
    """

    def __init__(self, key: Tensor, value: Tensor, window: int | None, size: Size) -> None:
        self.window = window
        # Keys get the values' dtype: autocast makes float32 keys, which the update also rounds.
        self.keys = value.new_zeros(0, key.shape[1], 0, key.shape[3])
        self.values = value.new_zeros(0, value.shape[1], 0, value.shape[3])
        self.resize(size)

    def resize(self, size: Size) -> None:
        """Change to `size`; keep the sequences and places that both sizes have."""
        width = size.width if self.window is None else min(size.width, self.window)
        self.keys = _resized(self.keys, size.slots, width)
        self.values = _resized(self.values, size.slots, width)

    def copy(self, origin: "KVTable", sources: Tensor, targets: Tensor) -> None:
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
    """One layer's tables of prompts and of each bucket."""

    def __init__(self, prompts: KVTable, buckets: list[KVTable]) -> None:
        self.prompts = prompts
        self.buckets = buckets


class StateCache:
    """States of linear attention and convolutions, after prompts and after responses so far.

    `scsdpo.policy.layout.Kept.states` says what a sequence takes, however long it is. States of
    responses stand in the order of the running responses.
    """

    def __init__(self) -> None:
        self.prompts: dict[int, list[Tensor]] = {}
        """Layer -> states [P, ...] by prompt slot."""
        self.rows: dict[int, list[Tensor]] = {}
        """Layer -> states [R, ...] of the running responses."""
        self.read = torch.zeros(0, dtype=torch.long)
        """[R] number of tokens that the states of each response have read."""
        self.fresh = self.read.bool()
        """[R]: True if the token of this step is new. A response that waits runs its last token
        again, which must not change its states."""

    def keep(self, layer: int, which: int, ends: Tensor) -> None:
        """Append states [p, ...] of new prompts; `which` numbers the layer's states."""
        states = self.prompts.setdefault(layer, [])
        if which == len(states):
            states.append(ends)
        else:
            states[which] = torch.cat([states[which], ends])

    def keep_prompts(self, slots: Sequence[int]) -> None:
        """Keep only the prompts in `slots`, in this order."""
        self.prompts = {n: [x[[*slots]] for x in states] for n, states in self.prompts.items()}

    def start(self, slots: Tensor) -> None:
        """Append responses that start after the prompts in `slots`."""
        self.read = torch.cat([self.read.to(slots.device), torch.zeros_like(slots)])
        for layer, states in self.prompts.items():
            new = [x[slots] for x in states]
            old = self.rows.get(layer)
            self.rows[layer] = [torch.cat(x) for x in zip(old, new, strict=True)] if old else new

    def order(self, rows: Tensor) -> None:
        """Keep only the responses `rows`, in this order."""
        self.read = self.read[rows]
        self.rows = {n: [x[rows] for x in states] for n, states in self.rows.items()}

    def at(self, columns: Tensor) -> None:
        """Note that each response runs the token at its place `columns` [R]."""
        self.fresh = columns >= self.read
        self.read = columns + 1


class KVCache:
    """Keys and values of all layers: prompts and buckets of responses.

    Args:
        max_tokens: room in tokens; larger sizes get no spare room.
        longest: most tokens of a response that are ever held.
    """

    def __init__(self, *, max_tokens: int, longest: int) -> None:
        self.max_tokens = max_tokens
        self.limits = [BLOCK]
        while self.limits[-1] < longest:
            self.limits.append(self.limits[-1] * _RATIO)
        self.limits[-1] = max(longest, 1)
        """Most tokens of a response in each bucket."""
        self.prompts = Size()
        self.buckets = [Size() for _ in self.limits]
        self.layers: dict[int, LayerCache] = {}
        self.states = StateCache()
        """States of linear attention and convolutions."""

    def layer(self, index: int, key: Tensor, value: Tensor, window: int | None) -> LayerCache:
        """The tables of layer `index`; the first call makes them in the shapes of its arguments."""
        if index not in self.layers:
            self.layers[index] = LayerCache(
                KVTable(key, value, window, self.prompts),
                [KVTable(key, value, window, size) for size in self.buckets],
            )
        return self.layers[index]

    @property
    def tokens(self) -> int:
        """Number of places that each layer holds."""
        return self.prompts.tokens + sum(size.tokens for size in self.buckets)

    def bucket_of(self, tokens: int) -> int:
        """Number of the bucket for a response that holds `tokens` tokens."""
        return next(b for b, limit in enumerate(self.limits) if tokens <= limit)

    def keep_prompts(self, slots: Sequence[int]) -> None:
        """Keep only the prompts in `slots`, in this order."""
        self.states.keep_prompts(slots)
        for layer in self.layers.values():
            index = torch.tensor(slots, dtype=torch.long, device=layer.prompts.keys.device)
            layer.prompts.keys = layer.prompts.keys[index]
            layer.prompts.values = layer.prompts.values[index]
        self.prompts = Size(len(slots), self.prompts.width)

    def fit(self, prompts: Size, buckets: Sequence[Size], moves: Sequence[Move] = ()) -> None:
        """Change to sizes with room for `prompts` and `buckets`, and make `moves` in their order.

        Layers change one after another, so that only one layer is held in both sizes at a time.
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
