"""Logits of one chunk of tokens and what is read off them; natural logs, no graph."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class TokenLogits:
    """Logits over the vocabulary at n positions, already divided by the sampling temperature.

    They are at least float32, whatever the model's dtype: a normaliser rounded to bf16 clamps the
    tail of a top-k support and can multiply the divergence tenfold.

    Args:
        logits: [n, V] float32 or float64; -inf forbids a token.
    """

    logits: Tensor

    @staticmethod
    def of(hidden: Tensor, head: nn.Linear, temperature: float) -> "TokenLogits":
        """Z = (h W^T + b) / temperature, for hidden states [n, D]."""
        raw = nn.functional.linear(hidden, head.weight, head.bias)
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return TokenLogits(wide if temperature == 1 else wide.div_(temperature))

    @cached_property
    def log_normalizer(self) -> Tensor:
        """[n, 1]: log sum_v exp z(v)."""
        return self.logits.logsumexp(-1, keepdim=True)

    @cached_property
    def log_probs(self) -> Tensor:
        """[n, V]: log S(v) = z(v) - log_normalizer."""
        return self.logits - self.log_normalizer

    @cached_property
    def probs(self) -> Tensor:
        """[n, V]: S(v)."""
        return self.logits.softmax(-1)

    def log_probs_at(self, ids: Tensor) -> Tensor:
        """[n, k]: log S of `ids` [n, k]."""
        return self.logits.gather(-1, ids) - self.log_normalizer

    def logprob(self, ids: Tensor) -> Tensor:
        """[n]: log S of one token per position."""
        return self.log_probs_at(ids[:, None])[:, 0]

    def entropy(self) -> Tensor:
        """[n]: H(S) = log_normalizer - sum_v S(v) z(v), nats; a forbidden token contributes 0."""
        # A batched product: an elementwise one would be one more [n, V] buffer.
        mean = torch.bmm(self.probs[:, None], self.logits[..., None])[:, 0]
        entropy = self.log_normalizer - mean
        if bool(entropy.isfinite().all()):
            return entropy[:, 0]
        return torch.special.entr(self.probs).sum(-1)
