"""Sequence-level advantages from a group's rewards, under the PPO clip: the GRPO family."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan, chosen
from scsdpo.advantage.modulator import Modulator, Unmodulated
from scsdpo.distributed import all_sum
from scsdpo.loss import (
    Chunk,
    Credit,
    Derivation,
    NeedsSignals,
    SparseCredit,
    mean_log_ratio,
)
from scsdpo.types import Judged


class Baseline(ABC):
    """What a rollout's reward is compared with."""

    @abstractmethod
    def centre(self, rewards: Tensor) -> Tensor:
        """R - baseline, [Q, G] -> [Q, G]."""


@dataclass(frozen=True)
class GroupMean(Baseline):
    """r_i - mean_j r_j."""

    def centre(self, rewards: Tensor) -> Tensor:
        return rewards - rewards.mean(-1, keepdim=True)


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    """r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean_j r_j); needs G > 1.

    Source:
        Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """

    def centre(self, rewards: Tensor) -> Tensor:
        group = rewards.shape[-1]
        return (rewards - rewards.mean(-1, keepdim=True)) * group / (group - 1)


class Scale(ABC):
    """What a centred reward is divided by."""

    @abstractmethod
    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        """[Q, G] centred rewards -> [Q, G] advantages; a group without spread gives exactly 0."""


@dataclass(frozen=True)
class Unscaled(Scale):
    """A = r - baseline.

    Source:
        Liu et al. 2025 (Dr.GRPO), arXiv:2503.20783.
    """

    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        return centred


@dataclass(frozen=True, kw_only=True)
class GroupStd(Scale):
    """A = (r - baseline) / (std_group(r) + eps).

    For binary rewards, ddof = 0 and eps = 0:  sum_i |A_i| = 2 G sqrt(p (1 - p)).

    Args:
        ddof: 0 population std, 1 sample std (TRL, verl: smaller by sqrt((G - 1) / G)).
        eps: added to the std, in reward units. Must be >= 0.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        Shao et al. 2024 (GRPO), arXiv:2402.03300.
    """

    ddof: int = 0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1):
            raise ValueError(f"`GroupStd(ddof=...)` must be 0 or 1, got {self.ddof}")
        if self.eps < 0:
            raise ValueError(f"`GroupStd(eps=...)` must be >= 0, got {self.eps}")

    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        if rewards.shape[-1] <= self.ddof:
            return torch.zeros_like(centred)
        std = rewards.std(-1, correction=self.ddof, keepdim=True)
        return torch.where(_spread(rewards), centred / (std + self.eps), 0.0)


@dataclass(frozen=True, kw_only=True)
class BatchStd(Scale):
    """A = (r - baseline) / (std over every centred reward of the batch, all ranks, + eps).

    Args:
        eps: added to the std, in reward units. Must be >= 0.

    Raises:
        ValueError: if `eps` < 0.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"`BatchStd(eps=...)` must be >= 0, got {self.eps}")

    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        sums = all_sum(
            torch.stack(
                [centred.square().sum(), centred.sum(), centred.new_tensor(centred.numel())]
            )
        )
        variance = sums[0] / sums[2] - (sums[1] / sums[2]).square()
        std = variance.clamp(min=0).sqrt()
        return torch.where(_spread(rewards), centred / (std + self.eps), 0.0)


@dataclass(frozen=True)
class GroupPassRate(Scale):
    """A = (r - p) / p with p the group's mean reward: hard questions weigh more.

    sum_i |A_i| = 2 G (1 - p) for binary rewards; p = 0 gives 0.

    Source:
        MaxRL, as stated in arXiv:2605.27765.
    """

    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        return torch.where(_spread(rewards), centred / rewards.mean(-1, keepdim=True), 0.0)


def _spread(rewards: Tensor) -> Tensor:
    """[Q, 1] bool: the group's rewards differ. Their std is not asked: it may round above 0."""
    return (rewards != rewards[:, :1]).any(-1, keepdim=True)


class RatioLevel(NeedsSignals, ABC):
    """Over what the importance ratio rho of the PPO clip is taken."""

    @abstractmethod
    def log_ratio(self, chunk: Chunk) -> Tensor:
        """[n] log rho of each token."""


@dataclass(frozen=True)
class TokenLevel(RatioLevel):
    """rho_t = S(y_t) / S_old(y_t), one per token."""

    def log_ratio(self, chunk: Chunk) -> Tensor:
        return chunk.log_ratio


@dataclass(frozen=True)
class SequenceLevel(RatioLevel):
    """rho = exp(mean_t log S(y_t) / S_old(y_t)), one per rollout; needs a measuring pass.

    With `SequenceMean` its token gradients add up to that of the sequence's ratio.

    Source:
        Zheng et al. 2025 (GSPO), arXiv:2507.18071.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student_logprob"})

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (mean_log_ratio,)

    def log_ratio(self, chunk: Chunk) -> Tensor:
        return chunk.derived(mean_log_ratio)


@dataclass(frozen=True, kw_only=True)
class GroupRelative(Advantage):
    """Clipped policy gradient. loss_t = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    A is one number per rollout, made from its group's rewards by `baseline` and `scale`. Credit
    is zero but at the sampled token: c(y_t) = rho A, and 0 where the clip binds. A group whose
    rewards are all equal has A = 0 and is not run at all.

    | method | baseline | scale | clip |
    |---|---|---|---|
    | GRPO | GroupMean | GroupStd | .2 / .2 |
    | Dr.GRPO, "w/o norm" | GroupMean | Unscaled | .2 / .2 |
    | RLOO | LeaveOneOut | Unscaled | .2 / .2 |
    | DAPO | GroupMean | GroupStd | .2 / .28, TokenMean |
    | MaxRL | GroupMean | GroupPassRate | .2 / .2 |

    Args:
        baseline: what a reward is compared with.
        scale: what the difference is divided by.
        clip_low: eps_low of the PPO clip, in [0, 1]. It binds only from a batch's second update.
        clip_high: eps_high of the PPO clip, >= 0.
        level: `TokenLevel()`, or `SequenceLevel()` (GSPO).
        modulator: a factor on A at each token, e.g. from the teacher; where the rollout has no
            teacher it is 1.

    Shapes:
        rewards [Q, G] -> A [Q, G].

    Raises:
        ValueError: if a clip is outside its range.

    Source:
        Shao et al. 2024, arXiv:2402.03300; Yu et al. 2025 (DAPO), arXiv:2503.14476.
    """

    baseline: Baseline = GroupMean()
    scale: Scale = GroupStd()
    clip_low: float = 0.2
    clip_high: float = 0.28
    level: RatioLevel = TokenLevel()
    modulator: Modulator = Unmodulated()

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"`GroupRelative(clip_low=...)` must be in [0, 1], got {self.clip_low}"
            )
        if self.clip_high < 0:
            raise ValueError(f"`GroupRelative(clip_high=...)` must be >= 0, got {self.clip_high}")

    @property
    def needs_group(self) -> bool:
        return True

    @property
    def has_ratio(self) -> bool:
        return True

    @property
    def needs_teacher(self) -> bool:
        return self.modulator.needs_teacher

    @property
    def contexts(self) -> int:
        return self.modulator.contexts

    @property
    def needs(self) -> frozenset[str]:
        return self.level.needs | self.modulator.needs

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (*self.level.derivations, *self.modulator.derivations)

    def advantages(self, rewards: Tensor) -> Tensor:
        """A [Q, G] float64."""
        wide = rewards.double()
        return self.scale.divide(self.baseline.centre(wide), wide)

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        advantages = self.advantages(judged.rewards)
        asked = available & (advantages != 0) & self.needs_teacher
        return Plan(
            active=advantages != 0,
            needs_teacher=asked,
            credit=partial(self._credit, advantages.flatten(), asked.flatten(), chosen(asked)),
        )

    def _credit(
        self, advantages: Tensor, asked: Tensor, taught: frozenset[int], chunk: Chunk
    ) -> Credit:
        log_ratio = self.level.log_ratio(chunk)
        advantage = advantages[chunk.rollout].to(log_ratio.dtype)
        if not taught.isdisjoint(chunk.rollouts):
            factor = self.modulator.factor(chunk, advantage)
            advantage = torch.where(asked[chunk.rollout], factor * advantage, advantage)
        ratio = log_ratio.exp()
        plain = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        credit = torch.where(plain <= clipped, plain, 0.0)
        objective = -torch.minimum(plain, clipped)
        return SparseCredit.at_sampled(chunk, credit, objective)
