"""Credit: the detached coefficients c(v) of d loss / d theta = -sum_v c(v) d log S(v) / d theta."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo import contracts
from scsdpo.loss.logits import TokenLogits
from scsdpo.loss.signals import Derivation, Signals


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """A chunk of n tokens with their distributions, from which an advantage computes credit."""

    student: TokenLogits
    """S, the distribution that is being trained."""
    teacher: Callable[[], TokenLogits]
    """T at the same positions, computed when first asked for."""
    reference: Callable[[], TokenLogits]
    """The anchor's distribution, computed when first asked for."""
    others: tuple[Callable[[], TokenLogits], ...]
    """Distributions of the teacher's weights after each further context of `Contexts`, in order.
    Where a rollout does not have the context, all logits are equal."""
    ids: Tensor
    """[n] int64: the sampled tokens y."""
    logprob: Tensor
    """[n]: log S(y)."""
    places: Tensor
    """[n] int64: flat index i * L + t into the step's tables [R, L]."""
    rollouts: frozenset[int]
    """The rollouts i that the tokens belong to, known on the host."""
    signals: Signals
    """Tables of the whole optimizer step."""

    @property
    def rollout(self) -> Tensor:
        """[n] int64: flat index i = q * G + g of the rollout that a token belongs to."""
        return self.places // self.signals.mask.shape[1]

    @property
    def log_ratio(self) -> Tensor:
        """[n]: log S(y) - log S_old(y), the PPO ratio; 0 in a batch's first update."""
        old = self.at(self.signals.old_logprob)
        return torch.where(old.isnan(), 0.0, self.logprob - old)

    def at(self, table: Tensor) -> Tensor:
        """[n]: the entries of a table [R, L] at this chunk's tokens."""
        return table.reshape(-1)[self.places].to(self.logprob.dtype)

    def derived(self, make: Derivation) -> Tensor:
        """[n]: the entries of a derived table at this chunk's tokens."""
        return self.at(self.signals.derive(make))


class Credit(ABC):
    """Coefficients on log S at one chunk of tokens, and the objective's value for the log.

    d loss / d z(v) = S(v) * mass - own(v), z the logits divided by the temperature. `mass` is one
    number per position. `own` is sparse where it can be, so that sums of credits touch few entries.
    """

    objective: Tensor
    """[n]: the loss of each token; its gradient is `logits_gradient`."""

    @abstractmethod
    def check(self, of: str, shape: tuple[int, ...]) -> None:
        """Check the tables against (n, V) = `shape`.

        Raises:
            ConfigurationError: if they do not fit. It names `of`, what came and what was expected.
        """

    @abstractmethod
    def to(self, dtype: torch.dtype) -> "Credit":
        """Convert its numbers to `dtype`, that of the chunk."""

    @abstractmethod
    def mass(self, student: TokenLogits) -> Tensor:
        """[n]: the coefficient of S(v) in the gradient."""

    @abstractmethod
    def subtract(self, gradient: Tensor, weight: Tensor, student: TokenLogits) -> None:
        """Subtract weight [n] * own from `gradient` [n, V], in place.

        Where a weight is 0 nothing is read.
        """

    def logits_gradient(self, student: TokenLogits) -> Tensor:
        """[n, V]: d loss / d z(v) = S(v) sum_u c(u) - c(v)."""
        gradient = student.probs * self.mass(student)[:, None]
        self.subtract(gradient, torch.ones_like(self.objective), student)
        return gradient


@dataclass(frozen=True, eq=False)
class DenseCredit(Credit):
    """c(v) for the whole vocabulary.

    Args:
        values: [n, V].
        objective: [n].
    """

    values: Tensor
    objective: Tensor

    def check(self, of: str, shape: tuple[int, ...]) -> None:
        _numbers(self.values, f"{of}, credit.values", "[n, V]", shape)
        _numbers(self.objective, f"{of}, credit.objective", "[n]", shape[:1])

    def to(self, dtype: torch.dtype) -> Credit:
        if self.values.dtype == self.objective.dtype == dtype:
            return self
        return DenseCredit(self.values.to(dtype), self.objective.to(dtype))

    def mass(self, student: TokenLogits) -> Tensor:
        return self.values.sum(-1)

    def subtract(self, gradient: Tensor, weight: Tensor, student: TokenLogits) -> None:
        read = student.table()
        _where_counted(weight, self.values, read)
        gradient.addcmul_(read, weight[:, None], value=-1)


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

    def check(self, of: str, shape: tuple[int, ...]) -> None:
        n, k = shape[0], self.ids.shape[-1]
        contracts.indices(self.ids, of=f"{of}, credit.ids", axes="[n, k]", shape=(n, k))
        _numbers(self.values, f"{of}, credit.values", "[n, k]", (n, k))
        _numbers(self.rest, f"{of}, credit.rest", "[n]", (n,))
        _numbers(self.objective, f"{of}, credit.objective", "[n]", (n,))

    def to(self, dtype: torch.dtype) -> Credit:
        if self.values.dtype == self.rest.dtype == self.objective.dtype == dtype:
            return self
        numbers = (table.to(dtype) for table in (self.values, self.rest, self.objective))
        return SparseCredit(self.ids, *numbers)

    @staticmethod
    def at_sampled(chunk: Chunk, values: Tensor, objective: Tensor) -> "SparseCredit":
        """Credit c(y) = values [n] at the sampled tokens, and 0 at every other token."""
        return SparseCredit(
            chunk.ids[:, None], values[:, None], torch.zeros_like(values), objective
        )

    @staticmethod
    def nothing(chunk: Chunk) -> "SparseCredit":
        """Credit 0 for all tokens of the chunk."""
        zero = torch.zeros_like(chunk.logprob)
        return SparseCredit.at_sampled(chunk, zero, zero)

    def mass(self, student: TokenLogits) -> Tensor:
        # sum_u c(u) - rest: rest * S is subtracted at all tokens, and added again at `ids`.
        return self._own(student).sum(-1)

    def subtract(self, gradient: Tensor, weight: Tensor, student: TokenLogits) -> None:
        gradient.scatter_add_(-1, self.ids, -weighted(weight[:, None], self._own(student)))

    def _own(self, student: TokenLogits) -> Tensor:
        """[n, k]: c - rest * S at `ids`."""
        return self.values - self.rest[:, None] * student.log_probs_at(self.ids).exp()


@dataclass(frozen=True, eq=False)
class SumCredit(Credit):
    """sum_i w_i c_i: a blend (constant w_i) or a route (w_i of zeros and ones).

    Args:
        parts: pairs of weights w_i [n] and credits. Where a weight is 0, its credit is not read:
            it may be undefined there.
    """

    parts: tuple[tuple[Tensor, Credit], ...]

    def check(self, of: str, shape: tuple[int, ...]) -> None:
        for w, part in self.parts:
            _numbers(w, f"{of}, weight of a credit", "[n]", shape[:1])
            part.check(of, shape)

    def to(self, dtype: torch.dtype) -> Credit:
        return SumCredit(tuple((w.to(dtype), part.to(dtype)) for w, part in self.parts))

    @property
    def objective(self) -> Tensor:  # type: ignore[override]
        return torch.stack([weighted(w, part.objective) for w, part in self.parts]).sum(0)

    def mass(self, student: TokenLogits) -> Tensor:
        return torch.stack([weighted(w, part.mass(student)) for w, part in self.parts]).sum(0)

    def subtract(self, gradient: Tensor, weight: Tensor, student: TokenLogits) -> None:
        for w, part in self.parts:
            part.subtract(gradient, weight * w, student)


def _numbers(table: Tensor, of: str, axes: str, shape: tuple[int, ...]) -> None:
    contracts.numbers(table, of=of, axes=axes, shape=shape)


def _where_counted(weight: Tensor, values: Tensor, out: Tensor) -> None:
    """Write values [n, V] into `out`, and 0 into the rows whose weight [n] is 0, nan or not.

    0 * nan is nan, indexing rows makes the host wait for a GPU, and `torch.where` takes a CPU six
    times as long. So the bits of these rows are cleared.
    """
    bits = torch.int32 if values.element_size() == 4 else torch.int64
    kept = -(weight != 0).to(bits)  # all ones, or all zeros
    torch.bitwise_and(values.view(bits), kept[:, None], out=out.view(bits))


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Weight * value, and 0 where the weight is 0, whatever the value."""
    return torch.where(weight != 0, weight * value, 0.0)
