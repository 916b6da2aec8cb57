"""Weights from pass rates, of the current batch or with earlier ones."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import tee

import torch
from torch import Tensor

from scsdpo.distributed import all_sum
from scsdpo.policy import CausalLM
from scsdpo.state import Instant, PassRates
from scsdpo.types import Judged
from scsdpo.weighting._base import Weighting


@dataclass(frozen=True)
class Uniform(Weighting):
    """W_j = 1 for every question."""

    def weigh(self, judged: Judged) -> Tensor:
        return torch.ones_like(judged.rewards, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class PassRate(Weighting):
    """SC-SDPO's curriculum. W_j = w_j / mean_{l in I} w_l,  w_j = (p_j (1 - p_j)) ** power

    p_j = k_j / G, and I is the set of the batch's informative questions, 0 < k_j < G, over all
    ranks. Questions outside I have W_j exactly 0. If I is empty all weights are 0, and no step is
    taken. W is computed from each batch alone, without epsilon, clip or floor. Its mean over I is
    1.

    power = 0.5 is the paper's (sum_i |A_i| of GRPO is 2 G sqrt(p (1 - p))), and 1 is its ablation;
    0 drops questions outside I and weighs the others equally. Where feedback teaches without any
    success (k = 0), SDPO alone would learn, and this weighting drops the question.

    Args:
        power: exponent a >= 0.

    Shapes:
        successes [Q, G] -> W [Q, G] float64, constant along G.

    Raises:
        ValueError: if `power` < 0.

    Source:
        SC-SDPO, arXiv:2605.27765v1, eq. (16).
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        if self.power < 0:
            raise ValueError(f"`PassRate(power=...)` must be >= 0, got {self.power}")

    @property
    def needs_group(self) -> bool:
        return True

    def weigh(self, judged: Judged) -> Tensor:
        p = judged.pass_rates
        informative = (p > 0) & (p < 1)
        raw = torch.where(informative, (p * (1 - p)) ** self.power, 0.0)
        total, count = all_sum(torch.stack([raw.sum(), informative.double().sum()]))
        mean = total / count if count > 0 else total.new_ones(())
        return (raw / mean)[:, None].expand(-1, judged.rewards.shape[1])


@dataclass(frozen=True, kw_only=True)
class RatePower(Weighting):
    """W_j = p_j^solved (1 - p_j)^failed, not normalised

    `solved` takes weight from questions that are too hard, `failed` from those that are mastered.
    With both 0 it is `Uniform` (0^0 is 1).

    Args:
        solved: exponent of the pass rate, >= 0.
        failed: exponent of the share of failures, >= 0.
        rates: the pass rates: of this batch (`Instant`), or with earlier ones (`MovingAverage`,
            `DecayedBeta`).

    Shapes:
        successes [Q, G] -> W [Q, G] float64, constant along G.

    Raises:
        ValueError: if an exponent is < 0 or not finite.
    """

    solved: float = 0.0
    failed: float = 0.0
    rates: PassRates = Instant()

    def __post_init__(self) -> None:
        for name, exponent in (("solved", self.solved), ("failed", self.failed)):
            if not 0 <= exponent < math.inf:
                raise ValueError(f"`RatePower({name}=...)` must be >= 0 and finite, got {exponent}")

    def weigh(self, judged: Judged) -> Tensor:
        p = self.rates.rates(judged)
        weights = p**self.solved * (1 - p) ** self.failed
        return weights[:, None].expand(-1, judged.rewards.shape[1])


@dataclass(frozen=True, kw_only=True)
class HardFilter(Weighting):
    """Keep the questions of medium difficulty. W_j = 1 if low <= p_j <= high, else 0

    p_j = k_j / G of each batch alone; W is not normalised. If no question of a batch is within the
    band, no step is taken.

    Args:
        low: smallest pass rate that is kept, in [0, 1].
        high: largest pass rate that is kept, in [low, 1].

    Raises:
        ValueError: if the band is not within [0, 1].

    Source:
        "SDPO + hard filter" of arXiv:2605.27765: .2 and .8.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                "`HardFilter(low=..., high=...)` must have 0 <= low <= high <= 1, "
                f"got {self.low} and {self.high}"
            )

    @property
    def needs_group(self) -> bool:
        return True

    def weigh(self, judged: Judged) -> Tensor:
        p = judged.pass_rates
        kept = ((p >= self.low) & (p <= self.high)).double()
        return kept[:, None].expand(-1, judged.rewards.shape[1])


@dataclass(frozen=True, kw_only=True)
class Product(Weighting):
    """The product of several weightings. W = prod_i W_i

    Factors that are normalised are so on their own; the product is not normalised again.

    Args:
        factors: the weightings; at least one.

    Raises:
        ValueError: if there are none.
    """

    factors: tuple[Weighting, ...]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("`Product(factors=...)` must name at least one weighting, got none")

    @property
    def needs_group(self) -> bool:
        return any(factor.needs_group for factor in self.factors)

    def configure(self, policy: CausalLM) -> None:
        for factor in self.factors:
            factor.configure(policy)

    def check_questions(self, keys: Iterable[str]) -> None:
        for factor, own in zip(self.factors, tee(keys, len(self.factors)), strict=True):
            factor.check_questions(own)

    def weigh(self, judged: Judged) -> Tensor:
        return torch.stack([factor.weights(judged) for factor in self.factors]).prod(0)
