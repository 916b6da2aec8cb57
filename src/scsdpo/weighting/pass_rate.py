"""Weights from the pass rate of the current batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.distributed import all_sum
from scsdpo.types import Outcomes
from scsdpo.weighting._base import Weighting


@dataclass(frozen=True)
class Uniform(Weighting):
    """W_j = 1 for every question."""

    def weigh(self, outcomes: Outcomes) -> Tensor:
        return torch.ones_like(outcomes.rewards, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class PassRate(Weighting):
    """SC-SDPO's curriculum. W_j = w_j / mean_{l in I} w_l,  w_j = (p_j (1 - p_j)) ** power

    with p_j = k_j / G and I the informative questions of the batch, 0 < k_j < G, over all ranks.
    Questions outside I have W_j exactly 0; if I is empty all weights are 0, and no step is taken.
    Recomputed every step, without history; no epsilon, clip or floor. The mean of W over I is 1.

    power = 0.5 is the paper's (sum_i |A_i| of GRPO is 2 G sqrt(p (1 - p))), 1 its ablation, and
    0 drops degenerate questions and weighs the rest equally. With feedback but no success (k = 0)
    SDPO alone still has a signal, which this weighting drops.

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

    def weigh(self, outcomes: Outcomes) -> Tensor:
        p = outcomes.pass_rates
        informative = (p > 0) & (p < 1)
        raw = torch.where(informative, (p * (1 - p)) ** self.power, 0.0)
        total, count = all_sum(torch.stack([raw.sum(), informative.double().sum()]))
        mean = total / count if count > 0 else total.new_ones(())
        return (raw / mean)[:, None].expand(-1, outcomes.rewards.shape[1])
