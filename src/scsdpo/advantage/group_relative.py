"""The GRPO family: advantages from a group's rewards, by rollout or by turn, with the PPO clip.

Baselines and scales compare along the last axis, G. In tables by turn, nan stands where a rollout
has no such turn. It is left out of the comparison.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan, rows_of
from scsdpo.advantage.modulator import Modulator, Unmodulated
from scsdpo.distributed import all_sum
from scsdpo.errors import ConfigurationError
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
    """The value that a rollout's reward is compared with."""

    @abstractmethod
    def centre(self, rewards: Tensor) -> Tensor:
        """R - baseline, [..., G] -> [..., G]; nan stays nan."""


@dataclass(frozen=True)
class GroupMean(Baseline):
    """r_i - mean_j r_j."""

    def centre(self, rewards: Tensor) -> Tensor:
        return rewards - rewards.nanmean(-1, keepdim=True)


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    """r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean_j r_j); needs G > 1.

    By turn, G is the number of rollouts that have the turn. Where only one has it, its baseline is
    0, so that the gradient stays unbiased (`TurnRelative`).

    Source:
        Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """

    def centre(self, rewards: Tensor) -> Tensor:
        group = _group_size(rewards)
        centred = (rewards - rewards.nanmean(-1, keepdim=True)) * group / (group - 1)
        return torch.where(group > 1, centred, rewards)


class Scale(ABC):
    """The number that a centred reward is divided by."""

    @abstractmethod
    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        """[..., G] centred rewards -> [..., G] advantages; nan stays nan.

        In a group whose rewards are all equal, advantages are exactly 0.
        """


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
        squares = (rewards - rewards.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
        std = (squares / (_group_size(rewards) - self.ddof)).sqrt()
        return _where_spread(rewards, centred / (std + self.eps))


@dataclass(frozen=True, kw_only=True)
class BatchStd(Scale):
    """A = (r - baseline) / (std of all centred rewards of the batch, over all ranks, + eps).

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
        known = _group_size(centred).sum().to(centred)
        sums = [centred.square().nansum(), centred.nansum(), known]
        squares, total, count = all_sum(torch.stack(sums))
        std = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        return _where_spread(rewards, centred / (std + self.eps))


@dataclass(frozen=True)
class GroupPassRate(Scale):
    """A = (r - p) / p with p the group's mean reward, so that hard questions weigh more.

    sum_i |A_i| = 2 G (1 - p) for binary rewards; p <= 0 gives 0.

    Source:
        MaxRL, as stated in arXiv:2605.27765.
    """

    def divide(self, centred: Tensor, rewards: Tensor) -> Tensor:
        rate = rewards.nanmean(-1, keepdim=True)
        return _where_spread(rewards, torch.where(rate > 0, centred / rate, 0 * centred))


def _group_size(rewards: Tensor) -> Tensor:
    """[..., 1] int64: number of a group's rewards that are not nan."""
    return (~rewards.isnan()).sum(-1, keepdim=True)


def _where_spread(rewards: Tensor, advantages: Tensor) -> Tensor:
    """The advantages, and 0 where the group's rewards are all equal.

    Rewards are compared, and not their std, which may round above 0.
    """
    highest = rewards.nan_to_num(-torch.inf).amax(-1, keepdim=True)
    lowest = rewards.nan_to_num(torch.inf).amin(-1, keepdim=True)
    return torch.where((highest > lowest) | rewards.isnan(), advantages, 0.0)


class RatioLevel(NeedsSignals, ABC):
    """The importance ratio rho of the PPO clip: by token or by sequence."""

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
    """rho = exp(mean_t log S(y_t) / S_old(y_t)), one per rollout.

    It needs a pass without gradient before the loss. With `SequenceMean` the gradients of a
    rollout's tokens add up to that of its ratio.

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

    A is one number per rollout, computed from its group's rewards by `baseline` and `scale`. Credit
    is 0 except at the sampled token: c(y_t) = rho A, and 0 where the clip binds. A group whose
    rewards are all equal has A = 0 and is not run.

    For a scalar advantage of your own, subclass this and override `advantages`.

    | method | baseline | scale | clip |
    |---|---|---|---|
    | GRPO | GroupMean | GroupStd | .2 / .2 |
    | Dr.GRPO, "w/o norm" | GroupMean | Unscaled | .2 / .2 |
    | RLOO | LeaveOneOut | Unscaled | .2 / .2 |
    | DAPO | GroupMean | GroupStd | .2 / .28, TokenMean |
    | MaxRL | GroupMean | GroupPassRate | .2 / .2 |

    Args:
        baseline: the value that a reward is compared with.
        scale: the number that the difference is divided by.
        clip_low: eps_low of the PPO clip, in [0, 1]. It can bind from a batch's second update on.
        clip_high: eps_high of the PPO clip, >= 0.
        level: `TokenLevel()`, or `SequenceLevel()` (GSPO).
        modulator: factor on A at each token, e.g. from the teacher; 1 where the rollout has no
            teacher.

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
        """A [..., G] float64, one per rollout, from rewards [..., G] along the last axis."""
        wide = rewards.double()
        return self.scale.divide(self.baseline.centre(wide), wide)

    def of_tokens(self, judged: Judged) -> Tensor:
        """A [Q, G, L] float64, one per token."""
        return self.advantages(judged.rewards)[..., None].expand(judged.responses.ids.shape)

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        advantages = self.of_tokens(judged)
        active = (advantages != 0).any(-1)
        taught = available & active & self.needs_teacher
        return Plan(
            active=active,
            needs_teacher=taught,
            credit=partial(self._credit, advantages.flatten(), taught.flatten(), rows_of(taught)),
        )

    def _credit(
        self, advantages: Tensor, taught: Tensor, rows: frozenset[int], chunk: Chunk
    ) -> Credit:
        log_ratio = self.level.log_ratio(chunk)
        advantage = chunk.at(advantages)
        if not rows.isdisjoint(chunk.rollouts):
            factor = self.modulator.factor(chunk, advantage)
            modulated = taught[chunk.rollout] & (advantage != 0)  # where A = 0 it may be undefined
            advantage = torch.where(modulated, factor * advantage, advantage)
        ratio = log_ratio.exp()
        plain = ratio * advantage
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        credit = torch.where(plain <= clipped, plain, 0.0)
        objective = -torch.minimum(plain, clipped)
        return SparseCredit.at_sampled(chunk, credit, objective)


@dataclass(frozen=True, kw_only=True)
class TurnRelative(GroupRelative):
    """Clipped policy gradient by turn. A_{i,k} compares the returns R_{i,k} of turn k in the group

        R_{i,k} = sum_{s >= k} discount^(s - k) r_{i,s}

    The group's rollouts that have a turn k are compared by `baseline` and `scale`, as in
    `GroupRelative`. So a turn gets no credit for rewards of earlier turns, and is compared with
    turns of the same number. r_{i,s} is `Observation.reward` of turn s, from `Environment.step`.
    The last turn earns its verdict's reward, less `Verdict.earned`, the part that earlier turns got
    already. If only the last turn earns a reward and discount = 1, R is the episode's reward in
    each turn. With one turn per rollout this is `GroupRelative`.

    With `LeaveOneOut`, `Unscaled` and discount = 1 the gradient, summed over tokens, is an unbiased
    estimate of the gradient of the expected sum of turn rewards. `GroupMean` shrinks turn k's part
    of it by the expectation of m / (m + 1), where m is the number of other rollouts that have the
    turn; where there are none, the turn gets no credit.

    Args:
        baseline: as in `GroupRelative`.
        scale: as in `GroupRelative`; `BatchStd` is over all turns of the batch.
        clip_low: as in `GroupRelative`.
        clip_high: as in `GroupRelative`.
        level: as in `GroupRelative`.
        modulator: as in `GroupRelative`; a factor on the turn's A.
        discount: factor on a reward that comes a turn later, in [0, 1]; 0: a turn's own reward
            alone counts.

    Shapes:
        `Judged.turn_rewards` [Q, G, T] -> A [Q, G, T].

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        The policy gradient with returns to go. Turn rewards, discounted and standardised within a
        group: Ding et al. 2025 (GTPO), arXiv:2511.14846; Zeng et al. 2025 (MT-GRPO),
        arXiv:2505.11821, adds a turn's standardised reward to the outcome's. Groups by number of
        turn are our reading.
    """

    discount: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount <= 1:
            raise ValueError(f"`TurnRelative(discount=...)` must be in [0, 1], got {self.discount}")

    def returns(self, judged: Judged) -> Tensor:
        """R [Q, G, T] float64; nan: the response has no such turn."""
        rewards = judged.turn_rewards
        later = torch.zeros_like(rewards[..., 0])
        columns = []
        for reward in rewards.unbind(-1)[::-1]:
            later = reward.nan_to_num(0.0) + self.discount * later
            columns.append(torch.where(reward.isnan(), torch.nan, later))
        return torch.stack(columns[::-1], dim=-1)

    def of_tokens(self, judged: Judged) -> Tensor:
        returns = self.returns(judged)
        by_turn = self.advantages(returns.mT).mT
        if bool((by_turn.isnan() & ~returns.isnan()).any()):
            raise ConfigurationError(
                f"`TurnRelative`: {type(self.baseline).__name__} and {type(self.scale).__name__} "
                "give nan for a turn that a rollout has. Rollouts of the group without that turn "
                "have the return nan: leave these out, for example with `torch.nanmean`"
            )
        # Padding has some turn's number, too; no token there is learned from.
        return by_turn.nan_to_num(0.0).gather(-1, judged.responses.turns.long())
