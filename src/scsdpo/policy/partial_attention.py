"""Softmax attention over several sets of keys, one after the other, without copying any of them.

The softmax over a union of key sets i is the mean of the softmaxes over each with the weights
exp(lse_i - lse), lse = log sum_i exp(lse_i), where lse_i is the log-normaliser of set i. The
gradient through set i takes the same form as if it were alone, with the union's lse and output o:

    p = exp(q k - lse),  dv = p^T g,  ds = p (g v^T - <g, o>),  dq = ds k,  dk = ds^T q

so that nothing but o and lse is kept for the backward.

Shapes: B rows, H query heads, K key heads (a divisor of H), n queries, t keys, d head size.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

TABLE_BYTES = 2**26
"""Of the table of scores that `Blocks` makes at once."""

Three = tuple[Tensor, Tensor, Tensor]
"""Of, or the gradients of, queries, keys and values."""
Seen = Tensor | bool
"""[B or 1, n, t] bool: which keys a query sees; True: query i sees keys 0..i; False: all."""


class PartialAttention(ABC):
    """Attention over one set of keys, with its log-normaliser; queries come scaled."""

    @abstractmethod
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """[B, H, n, d], [B, K, t, d] twice -> output [B, H, n, d] and lse [B, H, n].

        A query that sees no key has lse -inf and output 0.
        """

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        inputs: Three,
        outputs: tuple[Tensor, Tensor],
        seen: Seen,
    ) -> Three:
        """Gradients of query, key and value, given `grad`, output and lse of the union."""


def kernel(device: torch.device, seen: Seen) -> PartialAttention:
    """The fastest kernel there is for `seen` on `device`."""
    return Fused() if device.type == "cpu" and isinstance(seen, bool) else Blocks()


class Fused(PartialAttention):
    """torch's flash attention for CPU, which hands out its log-normaliser. No masks."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(query, key, value, 0.0, bool(seen), scale=1.0)

    def backward(
        self,
        grad: Tensor,
        inputs: Three,
        outputs: tuple[Tensor, Tensor],
        seen: Seen,
    ) -> Three:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, *inputs, *outputs, 0.0, bool(seen), scale=1.0)


class Blocks(PartialAttention):
    """Plain products, a block of queries at a time, in float32 at least: any device, any mask."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        queries, keys, values = (x.to(wide) for x in (query, key, value))
        outputs, normalizers = [], []
        for part in _blocks(queries, keys):
            scores = _scores(queries, keys, part, seen)
            # A row of -inf must not become nan: its top is a finite number.
            top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            mixed = _by_key_head(weights, values) / total.clamp(min=torch.finfo(wide).tiny)
            outputs.append(mixed)
            normalizers.append((top + total.log())[..., 0])
        return torch.cat(outputs, 2).to(query.dtype), torch.cat(normalizers, 2)

    def backward(
        self,
        grad: Tensor,
        inputs: Three,
        outputs: tuple[Tensor, Tensor],
        seen: Seen,
    ) -> Three:
        out, lse = outputs
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad, queries, keys, values = (x.to(wide) for x in (grad, *inputs))
        share = (grad * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for part in _blocks(queries, keys):
            weights = _scores(queries, keys, part, seen).sub_(lse[:, :, part, None]).exp_()
            here = grad[:, :, part]
            dv += _to_key_head(weights, here, keys)
            scores = _by_key_head(here, values.mT).sub_(share[:, :, part]).mul_(weights)
            dq[:, :, part] = _by_key_head(scores, keys)
            dk += _to_key_head(scores, queries[:, :, part], keys)
        return dq.to(inputs[0].dtype), dk.to(inputs[1].dtype), dv.to(inputs[2].dtype)


def _blocks(query: Tensor, key: Tensor) -> list[slice]:
    rows, heads, count, _ = query.shape
    size = TABLE_BYTES // (rows * heads * key.shape[2] * query.element_size())
    return [slice(start, start + max(size, 1)) for start in range(0, count, max(size, 1))]


def _scores(query: Tensor, key: Tensor, part: slice, seen: Seen) -> Tensor:
    """[B, H, block, t], -inf where the key is not seen."""
    scores = _by_key_head(query[:, :, part], key.mT)
    if isinstance(seen, Tensor):
        return scores.masked_fill_(~seen[:, None, part], -torch.inf)
    if seen:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        scores.masked_fill_(hidden.triu_(1 + part.start), -torch.inf)
    return scores


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
