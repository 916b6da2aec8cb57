"""Weights of tokens within a rollout."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.distributed import all_sum
from scsdpo.loss import NeedsSignals, Signals


class TokenWeighting(NeedsSignals, ABC):
    """A factor on each token's loss, from tables of the whole optimizer step."""

    @abstractmethod
    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        """Weights [R, L] float64 >= 0.

        Args:
            signals: the step's tables.
            distilled: [R, L] bool: sampled tokens of rollouts with a teacher.
        """


@dataclass(frozen=True)
class UniformTokens(TokenWeighting):
    """u_t = 1 for every token."""

    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        return torch.ones_like(distilled, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class TeacherEntropy(TokenWeighting):
    """More weight on a certain teacher. u_t = exp(-beta H(T_t)) / mean over distilled tokens

    The mean is over all distilled tokens of the optimizer step, on all ranks, so that their weights
    average to 1. Tokens without a teacher keep 1. beta = 0 is `UniformTokens`.

    Args:
        beta: decay of the weight, per nat of entropy, >= 0.

    Raises:
        ValueError: if `beta` < 0.

    Source:
        SRPO, arXiv:2604.02288, beta = 1.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"`TeacherEntropy(beta=...)` must be >= 0, got {self.beta}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_entropy"})

    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        raw = torch.where(distilled, torch.exp(-self.beta * signals.teacher_entropy.double()), 0.0)
        total, count = all_sum(torch.stack([raw.sum(), distilled.double().sum()]))
        mean = total / count if count > 0 else total.new_ones(())
        return torch.where(distilled, raw / mean, 1.0)


@dataclass(frozen=True, kw_only=True)
class Position(TokenWeighting):
    """More weight on later tokens. u_t = floor + (1 - floor) sigmoid((t / T - centre) / width)

    t = 1..T is the token's place in its response of T tokens. u rises from near `floor` to near 1.
    It is not normalised.

    Args:
        floor: weight of the earliest tokens, in [0, 1]; 1 is `UniformTokens`.
        centre: relative place t / T at which the weight has risen half of the way.
        width: width of the rise, in relative places. Must be > 0.

    Raises:
        ValueError: if `floor` is outside [0, 1], or `width` <= 0.

    Source:
        Code of PW-OPSD, arXiv:2605.21606: (.25, .30, .10).
    """

    floor: float = 0.25
    centre: float = 0.3
    width: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"`Position(floor=...)` must be in [0, 1], got {self.floor}")
        if not self.width > 0:
            raise ValueError(f"`Position(width=...)` must be > 0, got {self.width}")

    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        place = signals.mask.double().cumsum(-1) / signals.mask.sum(-1, keepdim=True).clamp(min=1)
        return self.floor + (1 - self.floor) * torch.sigmoid((place - self.centre) / self.width)


@dataclass(frozen=True, kw_only=True)
class Horizon(TokenWeighting):
    """DASH's weights. u_t = 1 + l_{t-1} u_{t-1}

    They make sum_t u_t r_t = sum_t A_t, with the returns A_t = r_t + l_t A_{t+1}.
    r_t is the token's objective (its divergence), and l_t = sigmoid(-sharpness (r_t - mean r)), the
    mean over the response; both are detached in u. The weight grows along tokens where student and
    teacher agree, and falls back to about 1 after a token where they do not. u is in [1, t], and is
    not normalised. Tokens without a teacher keep 1. sharpness = 0 gives l = 1/2.

    The advantage's objective, in a `Blend` that of the whole sum, is measured before the loss, in a
    second pass over the vocabulary.

    Args:
        sharpness: steepness of l, per nat, >= 0.

    Raises:
        ValueError: if `sharpness` < 0.

    Source:
        DASH, arXiv:2608.06243 (as reported by others): 5.
    """

    sharpness: float = 5.0

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError(f"`Horizon(sharpness=...)` must be >= 0, got {self.sharpness}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"objective"})

    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        local = torch.where(signals.mask, signals.objective, 0.0)
        mean = local.sum(-1, keepdim=True) / signals.mask.sum(-1, keepdim=True).clamp(min=1)
        gates = torch.sigmoid(-self.sharpness * (local - mean))
        weights, before = torch.ones_like(local), torch.zeros_like(local[:, 0])
        for t in range(local.shape[1]):
            weights[:, t] += before
            # Tokens between two turns, which the policy did not draw, do not count as places.
            before = torch.where(signals.mask[:, t], gates[:, t] * weights[:, t], before)
        return torch.where(distilled, weights, 1.0)


@dataclass(frozen=True)
class Overlong(TokenWeighting):
    """Overlong filtering: no loss on responses that were cut. u_t = 1 if it ended, else 0

    A response ended if an end-of-sequence token or a stop string closed it, and not the length cap.
    The reduction's denominators still count the responses that were cut.

    Source:
        DAPO, arXiv:2503.14476, section 3.4.
    """

    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        return signals.ended[:, None].double().expand_as(signals.mask).clone()


def contrast(signals: Signals, scale: float, width: float, threshold: float) -> Tensor:
    """[R, L]: RLCSD's r_t = scale tanh(e_t / width), 0 where |r_t| <= `threshold`.

    e_t is the teacher's log-prob of y_t after its own context, minus the mean over those of its
    further contexts that the rollout has; 0 where it has none.
    """
    known = ~signals.others.isnan()
    count = known.sum(0)
    mean = torch.where(known, signals.others, 0.0).sum(0) / count.clamp(min=1)
    difference = torch.where(count > 0, signals.teacher_logprob - mean, 0.0)
    shift = scale * torch.tanh(difference / width)
    return torch.where(shift.abs() > threshold, shift, 0.0)


def check_contrast(of: str, scale: float, width: float, threshold: float) -> None:
    """Check the arguments of `contrast`.

    Raises:
        ValueError: if one is outside its range, naming the class `of`.
    """
    for name, value in (("scale", scale), ("width", width)):
        if not value > 0:
            raise ValueError(f"`{of}({name}=...)` must be > 0, got {value}")
    if threshold < 0:
        raise ValueError(f"`{of}(threshold=...)` must be >= 0, got {threshold}")


@dataclass(frozen=True, kw_only=True)
class ContrastPaths(TokenWeighting):
    """RLCSD's two paths. u_t = T / (number of the response's tokens of t's kind)

    There are two kinds of tokens: those whose advantage `SiblingContrast` with the same arguments
    changes, and all others. With `SequenceMean` a response's loss is the mean over the first kind
    plus the mean over the second. T is the response's number of tokens.

    Args:
        scale: as in `SiblingContrast`.
        width: as in `SiblingContrast`.
        threshold: as in `SiblingContrast`.

    Raises:
        ValueError: as `SiblingContrast`.

    Source:
        RLCSD, arXiv:2606.11709, eq. (16) and (17).
    """

    scale: float = 0.5
    width: float = 1.0
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_contrast(type(self).__name__, self.scale, self.width, self.threshold)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_logprob", "others"})

    def weigh(self, signals: Signals, distilled: Tensor) -> Tensor:
        moved = contrast(signals, self.scale, self.width, self.threshold) != 0
        moved = moved & distilled
        lengths = signals.mask.sum(-1, keepdim=True).double()
        counts = (moved & signals.mask).sum(-1, keepdim=True)
        own = torch.where(moved, counts, lengths - counts).clamp(min=1)
        return torch.where(signals.mask, lengths / own, 1.0)
