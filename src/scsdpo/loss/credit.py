"""Credit: the detached coefficients c(v) of d loss / d theta = -sum_v c(v) d log S(v) / d theta."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.loss.logits import TokenLogits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """What an advantage may look at: n tokens, their distributions, and where they come from."""

    student: TokenLogits
    """S, the distribution that is being trained."""
    teacher: Callable[[], TokenLogits]
    """T at the same positions, computed when first asked for."""
    reference: Callable[[], TokenLogits]
    """The anchor's distribution, computed when first asked for."""
    ids: Tensor
    """[n] int64: the sampled tokens y."""
    rollout: Tensor
    """[n] int64: flat index q * G + g of the rollout that a token belongs to."""
    log_ratio: Tensor
    """[n]: log S(y) - log S_old(y), the PPO ratio; 0 in a batch's first update."""
    sequence_log_ratio: Tensor
    """[n]: the mean of `log_ratio` over the token's whole rollout; 0 unless it was measured."""


class Credit(ABC):
    """Coefficients on log S of one chunk, and the value of the objective for the log."""

    objective: Tensor
    """[n]: the loss of each token; its gradient is `logits_gradient`."""

    @abstractmethod
    def logits_gradient(self, student: TokenLogits) -> Tensor:
        """[n, V]: d loss / d z(v) = S(v) sum_u c(u) - c(v), z the temperature-scaled logits."""


@dataclass(frozen=True, eq=False)
class DenseCredit(Credit):
    """c(v) for the whole vocabulary.

    Args:
        values: [n, V].
        objective: [n].
    """

    values: Tensor
    objective: Tensor

    def logits_gradient(self, student: TokenLogits) -> Tensor:
        return student.probs * self.values.sum(-1, keepdim=True) - self.values


@dataclass(frozen=True, eq=False)
class SparseCredit(Credit):
    """c(v) = values at `ids`, and rest * S(v) at every other token.

    Args:
        ids: [n, k] int64, distinct within a position.
        values: [n, k].
        rest: [n]; a tail bucket with credit c_tail has rest = c_tail / S_tail.
        objective: [n].
    """

    ids: Tensor
    values: Tensor
    rest: Tensor
    objective: Tensor

    def logits_gradient(self, student: TokenLogits) -> Tensor:
        at_ids = student.log_probs_at(self.ids).exp()
        rest = self.rest[:, None]
        total = self.values.sum(-1, keepdim=True) + rest * (1 - at_ids.sum(-1, keepdim=True))
        gradient = student.probs * (total - rest)
        return gradient.scatter_add_(-1, self.ids, rest * at_ids - self.values)


@dataclass(frozen=True, eq=False)
class SumCredit(Credit):
    """sum_i w_i c_i: a blend (constant w_i) or a route (w_i of zeros and ones).

    Args:
        parts: pairs of weights w_i [n] and credits. Where a weight is 0, its credit is not read:
            it may be undefined there.
    """

    parts: tuple[tuple[Tensor, Credit], ...]

    @property
    def objective(self) -> Tensor:  # type: ignore[override]
        terms = [torch.where(w != 0, w * part.objective, 0.0) for w, part in self.parts]
        return torch.stack(terms).sum(0)

    def logits_gradient(self, student: TokenLogits) -> Tensor:
        total = torch.zeros_like(student.logits)
        for w, part in self.parts:
            w = w[:, None]
            total += torch.where(w != 0, w * part.logits_gradient(student), 0.0)
        return total
