"""Pass rates of questions, from this batch alone or with earlier ones."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scsdpo.distributed import all_gather
from scsdpo.state.stateful import Stateful
from scsdpo.types import Judged


class PassRates(ABC):
    """An estimate of how often the policy solves a question."""

    @abstractmethod
    def rates(self, judged: Judged) -> Tensor:
        """The estimate [Q] float64 for the batch's questions, with this batch in it.

        It may be called several times. State changes in `Stateful.observe` alone.
        """


@dataclass(frozen=True)
class Instant(PassRates):
    """p_j = k_j / G of this batch; nothing is remembered."""

    def rates(self, judged: Judged) -> Tensor:
        return judged.pass_rates


class _Remembered(PassRates, Stateful):
    """Keeps a few numbers for each question's key, the same ones on every rank.

    Memory grows with the number of distinct questions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        self.kept: dict[str, list[float]] = {}

    def rates(self, judged: Judged) -> Tensor:
        after = self._after(judged)
        rates = [self._rate(after[key]) for key in judged.keys]
        return torch.tensor(rates, dtype=torch.float64, device=judged.rewards.device)

    def observe(self, judged: Judged) -> None:
        self.kept |= self._after(judged)
        self.batches += 1

    def _after(self, judged: Judged) -> dict[str, list[float]]:
        """Question's key -> numbers to keep after this batch, for the questions of all ranks."""
        counts = judged.successes.double().sum(-1).tolist()
        group = judged.successes.shape[-1]
        after: dict[str, list[float]] = {}
        # Sorted, so that the order of a question's copies does not depend on their ranks.
        for key, right in sorted(all_gather(list(zip(judged.keys, counts, strict=True)))):
            kept = after.get(key, self.kept.get(key, []))
            after[key] = self._follow(kept, right, group, self.batches + 1)
        return after

    def remembered(self) -> dict[str, Any]:
        return {"batches": self.batches, "kept": self.kept}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.batches, self.kept = remembered["batches"], dict(remembered["kept"])

    @abstractmethod
    def _follow(self, kept: Sequence[float], right: float, group: int, batch: int) -> list[float]:
        """The numbers to keep after a group of `group` rollouts with `right` successes.

        Args:
            kept: the numbers before; empty at the question's first visit.
            right: successes.
            group: rollouts.
            batch: number of the batch.
        """

    @abstractmethod
    def _rate(self, kept: Sequence[float]) -> float:
        """The estimate from the kept numbers."""


class MovingAverage(_Remembered):
    """p <- (1 - follow) p + follow k / G at each visit of a question; at the first, p = k / G.

    Args:
        follow: weight of the new pass rate, in (0, 1]; 1 is `Instant`.

    Raises:
        ValueError: if `follow` is outside (0, 1].
    """

    def __init__(self, follow: float = 0.3) -> None:
        super().__init__()
        if not 0 < follow <= 1:
            raise ValueError(f"`MovingAverage(follow=...)` must be in (0, 1], got {follow}")
        self.follow = follow

    def _follow(self, kept: Sequence[float], right: float, group: int, batch: int) -> list[float]:
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
        decay: factor on the counts at each batch, in (0, 1].

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

    def _follow(self, kept: Sequence[float], right: float, group: int, batch: int) -> list[float]:
        a, b, last = kept or (0.0, 0.0, batch)
        left = self.decay ** (batch - last)
        return [left * a + right, left * b + group - right, batch]

    def _rate(self, kept: Sequence[float]) -> float:
        a, b, _ = kept
        return (self.prior + a) / (2 * self.prior + a + b)
