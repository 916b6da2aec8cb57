"""Reductions add token losses up to one number, with denominators of the whole optimizer step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scsdpo.distributed import all_sum

Over = Literal["all", "active"]
"""The rollouts that a denominator counts: all sampled ones, or those that can get credit."""


class Reduction(ABC):
    """Coefficients of token losses: loss = sum_{i,t} coefficient_i * loss_{i,t}."""

    @abstractmethod
    def coefficients(self, lengths: Tensor, active: Tensor) -> Tensor:
        """Coefficients [R] float64 of one optimizer step; those of active rollouts are used.

        Denominators are sums over all ranks.

        Args:
            lengths: [R] sampled tokens of each rollout.
            active: [R] bool: the rollout can get credit.
        """


@dataclass(frozen=True, kw_only=True)
class TokenMean(Reduction):
    """Mean over tokens. coefficient = 1 / sum_i |y_i|

    Args:
        over: `all` counts every sampled token, so that the loss shrinks with the share of rollouts
            without credit; `active` counts the tokens of rollouts with credit.
    """

    over: Over = "all"

    def coefficients(self, lengths: Tensor, active: Tensor) -> Tensor:
        counted = lengths.double() * _ones_where_counted(self.over, active)
        tokens = all_sum(counted.sum())
        return torch.ones_like(counted) / tokens.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class SequenceMean(Reduction):
    """Mean over rollouts of each rollout's token mean. coefficient_i = 1 / (R |y_i|)

    With over = "all", SDPO's published code computes the same ("token-mean" with micro-batches of
    one): rollouts without credit count as zeros.

    Args:
        over: R counts `all` rollouts, or the `active` ones.

    Source:
        Code of arXiv:2601.20802 (lasgroup/SDPO).
    """

    over: Over = "all"

    def coefficients(self, lengths: Tensor, active: Tensor) -> Tensor:
        rollouts = all_sum(_ones_where_counted(self.over, active).sum())
        return 1 / (rollouts.clamp(min=1) * lengths.double().clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class TokenSum(Reduction):
    """Sum over tokens, divided by constants. coefficient = 1 / (R constant)

    R counts all rollouts. No length is in it, so that each token counts alike in long and short
    responses.

    Args:
        constant: number of tokens, usually the cap on the response length. Must be > 0.

    Raises:
        ValueError: if `constant` <= 0.

    Source:
        Liu et al. 2025 (Dr.GRPO), arXiv:2503.20783.
    """

    constant: float

    def __post_init__(self) -> None:
        if self.constant <= 0:
            raise ValueError(f"`TokenSum(constant=...)` must be > 0, got {self.constant}")

    def coefficients(self, lengths: Tensor, active: Tensor) -> Tensor:
        rollouts = all_sum(_ones_where_counted("all", active).sum())
        return torch.ones_like(lengths, dtype=torch.float64) / (rollouts * self.constant)


def _ones_where_counted(over: Over, active: Tensor) -> Tensor:
    """[R] float64 of ones and zeros."""
    return active.double() if over == "active" else torch.ones_like(active, dtype=torch.float64)
