"""Corrections for rollouts that were drawn from another distribution than the trained one."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.contracts import declared
from scsdpo.loss.credit import Chunk
from scsdpo.loss.signals import Derivation, NeedsSignals, sampler_log_ratio


class Importance(NeedsSignals, ABC):
    """A detached factor on each token's loss, from the sampler's and the trainer's log-probs."""

    @declared
    def most(self) -> float:
        """Cap on the factor; inf: there is none."""
        return math.inf

    @declared
    def of_current(self) -> bool:
        """True if the ratio S / S_old of later updates is in the factor."""
        return False

    @abstractmethod
    def weigh(self, chunk: Chunk) -> Tensor:
        """Factor [n] >= 0 on the loss of each token of a chunk."""


@dataclass(frozen=True)
class NoImportance(Importance):
    """The factor 1 for every token."""

    def weigh(self, chunk: Chunk) -> Tensor:
        return torch.ones_like(chunk.logprob)


@dataclass(frozen=True, kw_only=True)
class _Truncated(Importance):
    cap: float = 2.0

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"`{type(self).__name__}(cap=...)` must be > 0, got {self.cap}")

    @property
    def most(self) -> float:
        return self.cap


@dataclass(frozen=True, kw_only=True)
class TokenImportance(_Truncated):
    """Truncated weights of the current policy. w_t = min(S(y_t) / S_rollout(y_t), cap), detached.

    It is 1 where sampler and trainer agree. S is the current policy, so that later updates on the
    same rollouts are corrected, too. This is SDPO's choice, for an objective without a ratio. With
    `GroupRelative` and several updates the ratio would count twice, so that is refused: use
    `SamplerImportance`.

    Args:
        cap: largest weight. Must be > 0.

    Raises:
        ValueError: if `cap` <= 0.

    Source:
        Code of arXiv:2601.20802 (lasgroup/SDPO), with cap 2.
    """

    @property
    def of_current(self) -> bool:
        return True

    def weigh(self, chunk: Chunk) -> Tensor:
        sampled = chunk.at(chunk.signals.sampling_logprob)
        return (chunk.logprob - sampled).exp().clamp(max=self.cap)


@dataclass(frozen=True, kw_only=True)
class SamplerImportance(_Truncated):
    """Truncated importance sampling. w_t = min(S_old(y_t) / S_rollout(y_t), cap), detached.

    S_old is the trainer's policy before the batch's first update. The weight corrects the
    difference of sampler and trainer (another engine, another dtype, top-k, stale weights). It is
    the same in later updates, whose ratio S / S_old the PPO clip handles.

    Where batches are sampled ahead, S_rollout is the distribution of the weights that drew the
    token, which may differ from token to token. With `GroupRelative` this is decoupled PPO:

        loss_t = -min(S_old / S_rollout, cap) min(u A, clip(u, 1 - eps, 1 + eps) A),  u = S / S_old

    Args:
        cap: largest weight. Must be > 0.

    Raises:
        ValueError: if `cap` <= 0.

    Source:
        Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
        Decoupled PPO: Hilton et al. 2021, arXiv:2110.00641; Fu et al. 2025 (AReaL),
        arXiv:2505.24298. Differs: AReaL's code drops tokens whose weight is above its cap; here the
        weight is cut to the cap.
    """

    def weigh(self, chunk: Chunk) -> Tensor:
        old = chunk.at(chunk.signals.old_logprob)
        old = torch.where(old.isnan(), chunk.logprob, old)
        return (old - chunk.at(chunk.signals.sampling_logprob)).exp().clamp(max=self.cap)


@dataclass(frozen=True, kw_only=True)
class SequenceImportance(_Truncated):
    """Truncated weights of whole responses. w = min(prod_t S_old(y_t) / S_rollout(y_t), cap)

    w is detached. It is unbiased for the sequence's distribution where the cap does not bind, also
    if older weights drew some or all of its tokens. It needs a pass without gradient in a batch's
    first update.

    Args:
        cap: largest weight. Must be > 0; inf: no cap.

    Raises:
        ValueError: if `cap` <= 0.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student_logprob"})

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (sampler_log_ratio,)

    def weigh(self, chunk: Chunk) -> Tensor:
        return chunk.derived(sampler_log_ratio).exp().clamp(max=self.cap)
