"""Sums, maxima, lists and errors over ranks, and the vote whether a batch is given up.

With one process sums, maxima and lists are the identity.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.interrupt import Interrupted, RankLost
from scsdpo.private.torch import default_store

T = TypeVar("T")


def place() -> tuple[int, int]:
    """Which rank it is, and of how many; (0, 1) with one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def all_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, on each of them, on the device of `value`."""
    return _reduced(value, dist.ReduceOp.SUM)


def all_max(value: Tensor) -> Tensor:
    """The largest `value` of all ranks, on each of them, on the device of `value`."""
    return _reduced(value, dist.ReduceOp.MAX)


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return value
    # NCCL knows no tensors of the host.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else value.device
    result = value.to(device, copy=True)
    dist.all_reduce(result, op=operation)
    return result.to(value.device)


def all_values(values: Tensor) -> Tensor:
    """The values [n] of all ranks, one after the other, on each of them; n may differ."""
    return torch.cat([part.to(values.device) for part in all_gather([values.cpu()])])


def all_gather(items: list[T]) -> list[T]:
    """The lists of all ranks (of objects that pickle), one after the other, on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients over ranks; a parameter without one counts as zero.

    Called once an optimizer step, after every micro-batch's backward, so that ranks may run
    different numbers of micro-batches, or none. Losses are divided by the denominators of all
    ranks, hence the sum and not the mean. Shards were summed by FSDP2, in the backward.
    """
    if place()[1] == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


class LocalError(TrainingStopped):
    """An error that only this rank raises: the others wait for it inside another collective."""


_SAME = {kind.__name__: kind for kind in (ConfigurationError, TrainingStopped)}


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteError:
    """An error as it travels to other ranks; exceptions themselves need not pickle."""

    rank: int
    kind: str
    said: str
    signum: int = 0

    @classmethod
    def of(cls, error: BaseException) -> "RemoteError":
        """An error of this rank."""
        rank, _ = place()
        if isinstance(error, Interrupted):
            return cls(rank=rank, kind="", said="", signum=error.signum)
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        kind = "OutOfMemoryError" if is_memory else type(error).__name__
        return cls(rank=rank, kind=kind, said=str(error) if kind in _SAME else first_line(error))

    def error(self) -> BaseException:
        """The exception that a rank without an error of its own raises."""
        if self.signum:
            return Interrupted(self.signum)
        if self.kind in _SAME:
            return _SAME[self.kind](self.said)
        if self.kind == "OutOfMemoryError":  # and every rank tries again, or none
            return torch.OutOfMemoryError(f"rank {self.rank}: {self.said}")
        return RuntimeError(f"rank {self.rank}: {self.kind}: {self.said}")


@contextmanager
def share_errors() -> Iterator[None]:
    """Raise an exception of any rank's block on all ranks, at the block's end; a collective.

    So no rank waits in a later collective for one that failed. All raise the lowest rank's error:
    its own exception there, elsewhere one of the same class and words (`ConfigurationError`,
    `TrainingStopped`, `Interrupted`, out of memory) or a `RuntimeError` that names rank and class.
    `LocalError`, a lost rank and what ends the process are raised at once, on this rank only.
    """
    error: BaseException | None = None
    try:
        yield
    except (LocalError, RankLost):
        raise
    except (Exception, Interrupted) as own:
        error = own
    raise_first(all_gather([None if error is None else RemoteError.of(error)]), error)


def raise_first(errors: Sequence[RemoteError | None], own: BaseException | None) -> None:
    """Raise the first of the ranks' errors, if there is one.

    Args:
        errors: of the ranks, in their order; None: no error.
        own: this rank's exception, raised itself if it is the first.
    """
    first = next((each for each in errors if each is not None), None)
    if first is None:
        return
    if own is not None and RemoteError.of(own) == first:
        raise own
    raise first.error() from own


class AbortVote:
    """Ranks agree through the process group's key-value store whether to give a window up.

    `scsdpo.interrupt` says what a window is. A collective could deadlock with one already under
    way. `compare_set` lets the first writer win: a rank that gives up writes its signal, the last
    rank to arrive at the window's end writes "keep".
    """

    def __init__(self) -> None:
        self._store = dist.PrefixStore("scsdpo", default_store())
        self._arrived = -1

    @classmethod
    def of_ranks(cls) -> "AbortVote | None":
        """A vote of all ranks; None with one process."""
        return cls() if place()[1] > 1 else None

    def heard(self) -> int:
        return int(self._store.get("asked")) if self._store.check(["asked"]) else 0

    def tell(self, signum: int) -> None:
        self._store.set("asked", str(signum))

    def give_up(self, window: int, signum: int) -> int:
        said = self._store.compare_set(f"window/{window}", "", str(signum)).decode()
        return 0 if said == "keep" else int(said)

    def arrive(self, window: int) -> bool | None:
        key = f"window/{window}"
        if self._arrived != window:
            self._arrived = window
            if self._store.add(f"{key}/there", 1) == dist.get_world_size():
                # Everyone has read what was said of the window before.
                self._store.delete_key(f"window/{window - 1}")
                self._store.delete_key(f"window/{window - 1}/there")
                return self._store.compare_set(key, "", "keep") == b"keep"
        return self._store.get(key) == b"keep" if self._store.check([key]) else None
