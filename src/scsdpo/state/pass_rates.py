"""Pass rates of questions: of this batch alone, or with what is remembered of earlier ones."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scsdpo.distributed import all_gather
from scsdpo.state.stateful import Stateful
from scsdpo.types import Outcomes


class PassRates(ABC):
    """An estimate of how often the policy solves a question."""

    @abstractmethod
    def observe(self, outcomes: Outcomes) -> Tensor:
        """Take in a batch, and give the estimate [Q] float64 for its questions; once a batch."""


@dataclass(frozen=True)
class Instant(PassRates):
    """p_j = k_j / G of this batch; nothing is remembered."""

    def observe(self, outcomes: Outcomes) -> Tensor:
        return outcomes.pass_rates


class _Remembered(PassRates, Stateful):
    """Keeps a few numbers for each question's key, the same on every rank.

    Memory grows with the number of distinct questions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        self.kept: dict[str, list[float]] = {}

    def observe(self, outcomes: Outcomes) -> Tensor:
        self.batches += 1
        counts = outcomes.successes.double().sum(-1).tolist()
        group = outcomes.successes.shape[-1]
        found = all_gather(list(zip(outcomes.question_keys(), counts, strict=True)))
        # Copies of a question come in an order that does not depend on which rank has which.
        for key, right in sorted(found):
            self.kept[key] = self._follow(self.kept.get(key, []), right, group)
        rates = [self._rate(self.kept[key]) for key in outcomes.keys]
        return torch.tensor(rates, dtype=torch.float64, device=outcomes.rewards.device)

    def remembered(self) -> dict[str, Any]:
        return {"batches": self.batches, "kept": self.kept}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.batches, self.kept = remembered["batches"], dict(remembered["kept"])

    @abstractmethod
    def _follow(self, kept: Sequence[float], right: float, group: int) -> list[float]:
        """What to keep of a question after a group with `right` successes; [] : first met."""

    @abstractmethod
    def _rate(self, kept: Sequence[float]) -> float:
        """The estimate."""


class MovingAverage(_Remembered):
    """p <- (1 - follow) p + follow k / G at each visit; the first visit gives p = k / G.

    Args:
        follow: share of the new pass rate, in (0, 1]; 1 is `Instant`.

    Raises:
        ValueError: if `follow` is outside (0, 1].
    """

    def __init__(self, follow: float = 0.3) -> None:
        super().__init__()
        if not 0 < follow <= 1:
            raise ValueError(f"`MovingAverage(follow=...)` must be in (0, 1], got {follow}")
        self.follow = follow

    def _follow(self, kept: Sequence[float], right: float, group: int) -> list[float]:
        now = right / group
        return [kept[0] + self.follow * (now - kept[0]) if kept else now]

    def _rate(self, kept: Sequence[float]) -> float:
        return kept[0]


class DecayedBeta(_Remembered):
    """Mean of a Beta posterior whose counts fade. p = (prior + a) / (2 prior + a + b)

    with a <- decay^n a + k and b <- decay^n b + G - k, n the batches since the question's last
    visit. decay = 1 and prior = 0 is the pass rate over all visits.

    Args:
        prior: pseudo-successes, and as many pseudo-failures. Must be >= 0.
        decay: what is left of a count after one batch, in (0, 1].

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        Published pseudocode of DRIFT, arXiv:2606.30345: prior 1, decay .85.
    """

    def __init__(self, prior: float = 1.0, decay: float = 0.85) -> None:
        super().__init__()
        if prior < 0:
            raise ValueError(f"`DecayedBeta(prior=...)` must be >= 0, got {prior}")
        if not 0 < decay <= 1:
            raise ValueError(f"`DecayedBeta(decay=...)` must be in (0, 1], got {decay}")
        self.prior, self.decay = prior, decay

    def _follow(self, kept: Sequence[float], right: float, group: int) -> list[float]:
        a, b, last = kept or (0.0, 0.0, self.batches)
        left = self.decay ** (self.batches - last)
        return [left * a + right, left * b + group - right, self.batches]

    def _rate(self, kept: Sequence[float]) -> float:
        a, b, _ = kept
        return (self.prior + a) / (2 * self.prior + a + b)
