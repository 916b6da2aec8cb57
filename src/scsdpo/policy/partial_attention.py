"""Softmax attention over several sets of keys, one after the other, without copies of them.

The softmax over a union of key sets i is the mean of the softmaxes over each with the weights
exp(lse_i - lse), lse = log sum_i exp(lse_i), where lse_i is the log-normaliser of set i. The
gradient through set i takes the same form as if it were alone, with the union's lse and output o:

    p = exp(q k - lse),  dv = p^T g,  ds = p (g v^T - <g, o>),  dq = ds k,  dk = ds^T q

so that only o and lse are kept for the backward.

Shapes: N queries and T keys, laid end to end in S runs each; H query heads, K key heads (a divisor
of H), d head size. Within a rectangle: B pairs of runs of n queries and t keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from scsdpo.private.torch import (
    cpu_flash_backward,
    cpu_flash_forward,
    flash_backward,
    flash_forward,
)

TABLE_BYTES = 2**26
"""Most bytes of a table of scores that `Blocks` makes at a time."""

Three = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or their gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """Which keys each query sees in one call: the i-th run of queries sees the i-th run of keys.

    Within a run a query at position p sees the keys at positions p - window + 1 to p.
    """

    queries: Sequence[int]
    """[S + 1] where each run of queries starts, and where the last one ends. No run is empty."""
    keys: Sequence[int]
    """[S + 1] where each run of keys starts, and where the last one ends. No run is empty."""
    query_starts: Tensor
    """`queries` as int32 on the device."""
    key_starts: Tensor
    """`keys` as int32 on the device."""
    at: Tensor
    """[N] int64: positions of the queries."""
    of: Tensor
    """[T] int64: positions of the keys."""
    causal: bool
    """True: queries and keys are the same tokens. False: every key is before every query of its
    run."""
    window: int | None
    """Positions that a query sees, its own included; None: all up to its own."""

    @cached_property
    def most_queries(self) -> int:
        """Length of the longest run of queries."""
        return max(stop - start for start, stop in pairwise(self.queries))

    @cached_property
    def most_keys(self) -> int:
        """Length of the longest run of keys."""
        return max(stop - start for start, stop in pairwise(self.keys))

    @cached_property
    def rectangles(self) -> "list[_Rectangle]":
        """Pairs of runs; neighbours of equal sizes are joined."""
        made: list[_Rectangle] = []
        pairs = zip(pairwise(self.queries), pairwise(self.keys), strict=True)
        for (q, q_end), (k, k_end) in pairs:
            if made and (made[-1].n, made[-1].t) == (q_end - q, k_end - k):
                made[-1].rows += 1
            else:
                made.append(_Rectangle(self, q, k, q_end - q, k_end - k))
        return made


class PartialAttention(ABC):
    """Attention over one set of keys, with its log-normaliser (lse); queries are already scaled."""

    @abstractmethod
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        """[N, H, d], [T, K, d], [T, K, d] -> output [N, H, d] and lse [H, N] in float32 or wider.

        A query that sees no key has lse -inf and output 0.
        """

    @abstractmethod
    def backward(
        self, grad: Tensor, inputs: Three, outputs: tuple[Tensor, Tensor], runs: Runs
    ) -> Three:
        """Gradients of query, key and value, given `grad`, output and lse of the union."""


def kernel(query: Tensor, runs: Runs) -> PartialAttention:
    """The fastest kernel that can run `runs` with queries like `query`."""
    if query.device.type == "cpu":
        return Fused() if runs.window is None else Blocks()
    if _flash_takes(query) and (runs.causal or runs.window is None):
        return Flash()
    return Blocks()


def _flash_takes(query: Tensor) -> bool:
    """True if torch's FlashAttention-2 runs such queries, forward and backward."""
    if not (query.is_cuda and torch.version.cuda and query.dtype in (torch.bfloat16, torch.half)):
        return False
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    major, minor = torch.cuda.get_device_capability(query.device)
    # On consumer GPUs shared memory is too small for the backward of larger heads.
    largest = 256 if minor == 0 and major < 12 else 192
    return major >= 8 and query.shape[-1] % 8 == 0 and query.shape[-1] <= largest


class Flash(PartialAttention):
    """torch's FlashAttention-2 over runs of any lengths: one launch for each call.

    It takes a window only for `causal` runs, because it counts positions from the end of a run's
    keys.

    Source:
        Dao 2023, arXiv:2307.08691. The backward takes the union's output and lse, as in Ring
        Attention (Liu et al. 2023, arXiv:2310.01889).
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        sizes, window = self._settings(runs)
        out, lse, *_ = flash_forward(query, key, value, *sizes, 0.0, runs.causal, False, **window)
        return out, lse

    def backward(
        self, grad: Tensor, inputs: Three, outputs: tuple[Tensor, Tensor], runs: Runs
    ) -> Three:
        out, lse = outputs
        sizes, window = self._settings(runs)
        unused = lse.new_empty((2,), dtype=torch.uint64)  # random state of dropout, which is 0
        return flash_backward(
            grad, *inputs, out, lse, *sizes, 0.0, runs.causal, unused, unused, **window
        )

    def _settings(self, runs: Runs) -> tuple[tuple[Tensor, Tensor, int, int], dict[str, float]]:
        # If no run has more than one query, the kernel swaps heads and queries, and returns the
        # lse of grouped heads in another order.
        most = max(runs.most_queries, 2)
        window = {} if runs.window is None else {"window_size_left": runs.window - 1}
        return (runs.query_starts, runs.key_starts, most, runs.most_keys), {"scale": 1.0, **window}


class _ByRectangle(PartialAttention):
    """Runs one batch of equally long runs after another."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(query.shape)
        lse = query.new_empty((query.shape[1], len(query)), dtype=wide)
        for part in runs.rectangles:
            inputs = part.queries(query), part.keys(key), part.keys(value)
            made, normalizer = self.rectangle(inputs, part)
            part.queries(out).copy_(made)
            part.lse(lse).copy_(normalizer)
        return out, lse

    def backward(
        self, grad: Tensor, inputs: Three, outputs: tuple[Tensor, Tensor], runs: Runs
    ) -> Three:
        query, key, value = inputs
        tables = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(key.shape)
        for part in runs.rectangles:
            of = part.queries(query), part.keys(key), part.keys(value)
            results = part.queries(outputs[0]), part.lse(outputs[1])
            made = self.rectangle_backward(part.queries(grad), of, results, part)
            part.queries(tables[0]).copy_(made[0])
            part.keys(tables[1]).copy_(made[1])
            part.keys(tables[2]).copy_(made[2])
        return tables

    @abstractmethod
    def rectangle(self, inputs: Three, part: "_Rectangle") -> tuple[Tensor, Tensor]:
        """[B, H, n, d], [B, K, t, d], [B, K, t, d] -> output [B, H, n, d] and lse [B, H, n]."""

    @abstractmethod
    def rectangle_backward(
        self, grad: Tensor, inputs: Three, outputs: tuple[Tensor, Tensor], part: "_Rectangle"
    ) -> Three:
        """Gradients of query, key and value."""


class Fused(_ByRectangle):
    """torch's flash attention for CPU, which returns its log-normaliser. It takes no window."""

    def rectangle(self, inputs: Three, part: "_Rectangle") -> tuple[Tensor, Tensor]:
        return cpu_flash_forward(*inputs, 0.0, part.runs.causal, scale=1.0)

    def rectangle_backward(
        self, grad: Tensor, inputs: Three, outputs: tuple[Tensor, Tensor], part: "_Rectangle"
    ) -> Three:
        return cpu_flash_backward(grad, *inputs, *outputs, 0.0, part.runs.causal, scale=1.0)


class Blocks(_ByRectangle):
    """Plain matrix products, one block of queries at a time, in float32 or wider.

    It works on any device and with any window.
    """

    def rectangle(self, inputs: Three, part: "_Rectangle") -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        queries, keys, values = (x.to(wide) for x in inputs)
        outputs, normalizers = [], []
        for block in _blocks(queries, keys):
            scores = part.hide(_by_key_head(queries[:, :, block], keys.mT), block)
            # The clamp keeps a row of -inf from becoming nan.
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            mixed = _by_key_head(weights, values) / total.clamp(min=torch.finfo(wide).tiny)
            outputs.append(mixed)
            normalizers.append((top + total.log())[..., 0])
        return torch.cat(outputs, 2), torch.cat(normalizers, 2)

    def rectangle_backward(
        self, grad: Tensor, inputs: Three, outputs: tuple[Tensor, Tensor], part: "_Rectangle"
    ) -> Three:
        out, lse = outputs
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad, queries, keys, values = (x.to(wide) for x in (grad, *inputs))
        share = (grad * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in _blocks(queries, keys):
            scores = part.hide(_by_key_head(queries[:, :, block], keys.mT), block)
            weights = scores.sub_(lse[:, :, block, None]).exp_()
            here = grad[:, :, block]
            dv += _to_key_head(weights, here, keys)
            of_scores = _by_key_head(here, values.mT).sub_(share[:, :, block]).mul_(weights)
            dq[:, :, block] = _by_key_head(of_scores, keys)
            dk += _to_key_head(of_scores, queries[:, :, block], keys)
        return dq, dk, dv


@dataclass(eq=False)
class _Rectangle:
    """B pairs of runs, one after the other, of n queries and t keys each."""

    runs: Runs
    query: int
    """Place of the first query."""
    key: int
    """Place of the first key."""
    n: int
    t: int
    rows: int = 1
    """B."""

    def queries(self, table: Tensor) -> Tensor:
        """[N, H, d] -> [B, H, n, d], a view."""
        return table[self._queries].unflatten(0, (self.rows, self.n)).transpose(1, 2)

    def keys(self, table: Tensor) -> Tensor:
        """[T, K, d] -> [B, K, t, d], a view."""
        return table[self._keys].unflatten(0, (self.rows, self.t)).transpose(1, 2)

    def lse(self, table: Tensor) -> Tensor:
        """[H, N] -> [B, H, n], a view."""
        return table[:, self._queries].unflatten(1, (self.rows, self.n)).transpose(0, 1)

    def hide(self, scores: Tensor, block: slice) -> Tensor:
        """Set `scores` [B, H, block, t] to -inf, in place, where a query does not see the key."""
        if not self.runs.causal and self.runs.window is None:
            return scores
        at = self.runs.at[self._queries].unflatten(0, (self.rows, self.n))[:, block, None]
        back = at - self.runs.of[self._keys].unflatten(0, (self.rows, self.t))[:, None]
        hidden = back < 0
        if self.runs.window is not None:
            hidden |= back >= self.runs.window
        return scores.masked_fill_(hidden[:, None], -torch.inf)

    @property
    def _queries(self) -> slice:
        return slice(self.query, self.query + self.rows * self.n)

    @property
    def _keys(self) -> slice:
        return slice(self.key, self.key + self.rows * self.t)


def _blocks(query: Tensor, key: Tensor) -> list[slice]:
    rows, heads, count, _ = query.shape
    size = TABLE_BYTES // (rows * heads * key.shape[2] * query.element_size())
    return [slice(start, start + max(size, 1)) for start in range(0, count, max(size, 1))]


def _by_key_head(rows: Tensor, table: Tensor) -> Tensor:
    """[B, H, n, a] times the key head's [B, K, a, b] -> [B, H, n, b]."""
    batch, heads, count, inner = rows.shape
    grouped = rows.reshape(batch, table.shape[1], -1, inner)
    return (grouped @ table).view(batch, heads, count, -1)


def _to_key_head(rows: Tensor, others: Tensor, key: Tensor) -> Tensor:
    """[B, H, n, t]^T times [B, H, n, d], summed over the queries of a key head: [B, K, t, d]."""
    batch, heads = key.shape[:2]
    grouped = (x.reshape(batch, heads, -1, x.shape[-1]) for x in (rows, others))
    left, right = grouped
    return left.mT @ right
