"""Logits of one chunk of tokens, and log-probs and entropies from them; natural logs, no graph."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn


class Buffers:
    """Memory for tables [n, V], which all chunks use one after the other.

    On CPU the pages of a new table of some MiB cost more time than the matrix product that fills
    it. `take` hands out one table after the other, until `recycle` makes all of them free again.
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []
        self._taken = 0

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised table [rows, columns], reserved until `recycle`."""
        mine, self._taken = self._taken, self._taken + 1
        if mine == len(self._tables):
            self._tables.append(torch.empty(rows, columns, dtype=dtype, device=device))
        kept = self._tables[mine]
        if kept.dtype != dtype or kept.shape[1] != columns or len(kept) < rows:
            kept = self._tables[mine] = torch.empty(rows, columns, dtype=dtype, device=device)
        return kept[:rows]

    def recycle(self) -> None:
        """Free all tables; the next `take` may overwrite them."""
        self._taken = 0


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A head's detached weight and bias, in the dtype in which its product is computed."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""

    @staticmethod
    def of(linear: nn.Linear) -> "Head":
        """The head of `linear`, under autocast in autocast's dtype, cast once for all chunks."""
        kind = linear.weight.device.type
        narrow = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if narrow else linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        return Head(linear.weight.detach().to(dtype), bias)

    def first(self, rows: int) -> "Head":
        """The first rows: a teacher's vocabulary may be padded further than the student's."""
        if len(self.weight) == rows:
            return self
        return Head(self.weight[:rows], None if self.bias is None else self.bias[:rows])


@dataclass(frozen=True, eq=False)
class TokenLogits:
    """Logits over the vocabulary at n positions, already divided by the sampling temperature.

    They are at least float32, whatever the model's dtype. A normaliser rounded to bf16 would clamp
    the tail of a top-k support, and could multiply the divergence by ten.

    Args:
        logits: [n, V] float32 or float64; -inf forbids a token.
        buffers: memory for further tables [n, V].
    """

    logits: Tensor
    buffers: Buffers = field(default_factory=Buffers)

    @staticmethod
    def of(
        hidden: Tensor, head: nn.Linear | Head, temperature: float, buffers: Buffers | None = None
    ) -> "TokenLogits":
        """Z = (h W^T + b) / temperature, for hidden states [n, D]."""
        head = head if isinstance(head, Head) else Head.of(head)
        buffers = Buffers() if buffers is None else buffers
        narrow = hidden.to(head.weight.dtype)
        wide = torch.promote_types(narrow.dtype, torch.float32)
        logits = buffers.take(len(hidden), len(head.weight), wide, hidden.device)
        multiply(narrow, head.weight.T, logits)
        if head.bias is not None:
            logits += head.bias
        return TokenLogits(logits if temperature == 1 else logits.div_(temperature), buffers)

    def table(self) -> Tensor:
        """An uninitialised table [n, V] from the buffers."""
        n, vocabulary = self.logits.shape
        return self.buffers.take(n, vocabulary, self.logits.dtype, self.logits.device)

    @cached_property
    def log_normalizer(self) -> Tensor:
        """[n, 1]: log sum_v exp z(v) = max z - log max S; exact, since both are largest entries."""
        return self.logits.amax(-1, keepdim=True) - self.probs.amax(-1, keepdim=True).log()

    @cached_property
    def log_probs(self) -> Tensor:
        """[n, V]: log S(v) = z(v) - log_normalizer."""
        return torch.sub(self.logits, self.log_normalizer, out=self.table())

    @cached_property
    def probs(self) -> Tensor:
        """[n, V]: S(v)."""
        return torch.softmax(self.logits, -1, out=self.table())

    def log_probs_at(self, ids: Tensor) -> Tensor:
        """[n, k]: log S of `ids` [n, k]."""
        return self.logits.gather(-1, ids) - self.log_normalizer

    def logprob(self, ids: Tensor) -> Tensor:
        """[n]: log S of one token per position."""
        return self.log_probs_at(ids[:, None])[:, 0]

    def entropy(self) -> Tensor:
        """[n]: H(S) = log_normalizer - sum_v S(v) z(v), nats; a forbidden token contributes 0."""
        products = torch.mul(self.probs, self.logits, out=self.table())
        # `nansum` drops 0 * -inf of forbidden tokens. Any other nan is in the normaliser, too.
        return self.log_normalizer[:, 0] - products.nansum(-1)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right into `out`, whose dtype may be wider.

    CUDA sums products of bfloat16 in float32 and can return them so. Elsewhere the product is
    rounded to the dtype of `left` first.
    """
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif _keeps_sums(left, out):
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    else:
        out.copy_(left @ right)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add left @ right to `out`, as `multiply` computes it."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out)
    elif _keeps_sums(left, out):
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        out.add_(left @ right)


def _keeps_sums(narrow: Tensor, out: Tensor) -> bool:
    """True if the product of such tensors is returned in the dtype of its sums."""
    halves = torch.bfloat16, torch.float16
    return narrow.is_cuda and narrow.dtype in halves and out.dtype == torch.float32
