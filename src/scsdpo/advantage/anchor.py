"""Regularisers: an estimated KL to the reference, and the student's entropy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.loss import Chunk, Credit, DenseCredit, SparseCredit
from scsdpo.types import Judged


class Estimator(ABC):
    """An estimate of KL(S || R) from one token y ~ S, with x = log S(y) - log R(y)."""

    @abstractmethod
    def value(self, log_ratio: Tensor) -> Tensor:
        """The estimate [n], nats."""

    @abstractmethod
    def credit(self, log_ratio: Tensor) -> Tensor:
        """c(y) [n]: minus the coefficient of d log S(y) in the gradient."""


@dataclass(frozen=True)
class K1(Estimator):
    """Value x, unbiased; c(y) = -x, whose mean is the gradient of KL(S || R).

    The credit is that of x as a cost in a policy gradient. As a loss, x would give c(y) = -1, with
    a gradient of 0 on average.
    """

    def value(self, log_ratio: Tensor) -> Tensor:
        return log_ratio

    def credit(self, log_ratio: Tensor) -> Tensor:
        return -log_ratio


@dataclass(frozen=True)
class K2(Estimator):
    """Value x^2 / 2, biased and >= 0; c(y) = -x, on average the gradient of KL(S || R).

    Source:
        SDPG, arXiv:2606.04036, as its first choice.
    """

    def value(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.square() / 2

    def credit(self, log_ratio: Tensor) -> Tensor:
        return -log_ratio


@dataclass(frozen=True)
class K3(Estimator):
    """Value exp(-x) - 1 + x, unbiased and >= 0; c(y) = exp(-x) - 1.

    Its mean gradient is that of KL(R || S), the other direction, which GRPO's published loss
    descends.

    Source:
        GRPO, arXiv:2402.03300, eq. (4).
    """

    def value(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(-log_ratio) + log_ratio

    def credit(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(-log_ratio)


@dataclass(frozen=True, kw_only=True)
class ReferenceKL(Advantage):
    """KL to the reference, estimated at the sampled tokens. c(y) is the estimator's, else 0

    Blend it with a coefficient. `ReferenceAnchor` has no estimator's noise.

    Args:
        estimator: `K1()`, `K2()` or `K3()`.

    Source:
        J. Schulman, "Approximating KL divergence", for the estimators' values.
    """

    estimator: Estimator = K3()

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def objective_name(self) -> str:
        return "divergence"

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        everyone = torch.ones_like(available)
        return Plan(active=everyone, needs_reference=everyone, credit=self._credit)

    def _credit(self, chunk: Chunk) -> Credit:
        log_ratio = chunk.logprob - chunk.reference().logprob(chunk.ids)
        value = self.estimator.credit(log_ratio)
        return SparseCredit.at_sampled(chunk, value, objective=self.estimator.value(log_ratio))


@dataclass(frozen=True)
class EntropyBonus(Advantage):
    """Entropy bonus. objective = -H(S); c(v) = S(v) (A(v) - E_S[A]), A = -log S

    Blend it with a coefficient. H is in nats; the gradient is 0 iff S is uniform.
    """

    @property
    def objective_name(self) -> str:
        return "negative_entropy"

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(active=torch.ones_like(available), credit=self._credit)

    def _credit(self, chunk: Chunk) -> Credit:
        entropy = chunk.student.entropy()
        probs = chunk.student.log_probs.exp()
        surprise = torch.where(probs > 0, -chunk.student.log_probs, 0.0)
        return DenseCredit(values=probs * (surprise - entropy[:, None]), objective=-entropy)
