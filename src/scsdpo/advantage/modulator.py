"""Factors on a rollout's advantage at each token: where in the response the credit belongs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.loss import Chunk


class Modulator(ABC):
    """A factor on the sequence's advantage, token by token; inside the PPO clip."""

    @property
    def needs_teacher(self) -> bool:
        """Whether it reads the teacher."""
        return True

    @abstractmethod
    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        """[n] >= 0, for the advantage [n]; read only where the rollout has a teacher."""


@dataclass(frozen=True)
class Unmodulated(Modulator):
    """1 everywhere."""

    @property
    def needs_teacher(self) -> bool:
        return False

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        return torch.ones_like(advantage)


@dataclass(frozen=True, kw_only=True)
class TeacherRatio(Modulator):
    """RLSD's. factor = (1 - mix) + mix clip(exp(sign(A) (log T(y) - log S(y))), 1 -+ band)

    Credit goes to the tokens of a success that the teacher likes better than the student, and
    blame to those of a failure that it likes less. Detached. mix = 0 is `Unmodulated`.

    Args:
        mix: share of the teacher's say, in [0, 1].
        band: half width of the clip around 1, >= 0.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        RLSD, arXiv:2604.03128.
    """

    mix: float = 0.5
    band: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"`TeacherRatio(mix=...)` must be in [0, 1], got {self.mix}")
        if self.band < 0:
            raise ValueError(f"`TeacherRatio(band=...)` must be >= 0, got {self.band}")

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        difference = chunk.teacher().logprob(chunk.ids) - chunk.logprob
        ratio = (advantage.sign() * difference).exp().clamp(1 - self.band, 1 + self.band)
        return 1 - self.mix + self.mix * ratio


@dataclass(frozen=True, kw_only=True)
class Surprise(Modulator):
    """DRIFT's. factor = min(exp(sharpness d), cap), d = max(log S(y) - log T(y) - margin, 0)

    Tokens at which the student went its own way weigh more. Detached; >= 1.

    Args:
        sharpness: per nat, >= 0; 0 is `Unmodulated`.
        margin: nats that do not count yet.
        cap: largest factor, >= 1.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        DRIFT, arXiv:2606.30345.
    """

    sharpness: float = 1.0
    margin: float = 0.0
    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError(f"`Surprise(sharpness=...)` must be >= 0, got {self.sharpness}")
        if self.cap < 1:
            raise ValueError(f"`Surprise(cap=...)` must be >= 1, got {self.cap}")

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        excess = chunk.logprob - chunk.teacher().logprob(chunk.ids) - self.margin
        return (self.sharpness * excess.clamp(min=0)).exp().clamp(max=self.cap)
