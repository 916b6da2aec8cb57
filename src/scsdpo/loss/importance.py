"""Correction for rollouts that were drawn from another distribution than the one being trained."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Importance(ABC):
    """A detached factor on each token's loss, from the sampler's and the trainer's log-probs."""

    @abstractmethod
    def weigh(self, log_ratio: Tensor) -> Tensor:
        """Log S(y) - log S_rollout(y) [n] -> factor [n] >= 0."""


@dataclass(frozen=True)
class NoImportance(Importance):
    """Every token counts once."""

    def weigh(self, log_ratio: Tensor) -> Tensor:
        return torch.ones_like(log_ratio)


@dataclass(frozen=True, kw_only=True)
class TokenImportance(Importance):
    """Truncated token importance weights. w_t = min(S(y_t) / S_rollout(y_t), cap), detached.

    1 where sampler and trainer agree; S is the current policy, so that it also corrects later
    updates on the same rollouts.

    Args:
        cap: largest weight. Must be > 0.

    Raises:
        ValueError: if `cap` <= 0.

    Source:
        Code of arXiv:2601.20802 (lasgroup/SDPO), with cap 2.
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"`TokenImportance(cap=...)` must be > 0, got {self.cap}")

    def weigh(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp().clamp(max=self.cap)
