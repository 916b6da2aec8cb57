"""Sums, maxima, lists and errors over ranks, and the vote on whether to abort a batch.

With one process, sums, maxima and lists are returned unchanged.
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
from scsdpo.prompt import stable_hash

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """(rank of this process, number of ranks); (0, 1) with one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first_to_ask(question: str) -> bool:
    """True on the first rank that asks with these words, and on every rank without a store.

    It is no collective. With one process it is True.
    """
    if rank_and_size()[1] == 1:
        return True
    try:
        asked: int = default_store().add(f"scsdpo/asked/{stable_hash(question)}", 1)
    except RuntimeError:  # the process that kept the store has ended
        return True
    return asked == 1


def all_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, on every rank and on the device of `value`."""
    return _reduced(value, dist.ReduceOp.SUM)


def all_max(value: Tensor) -> Tensor:
    """The largest `value` of all ranks, on every rank and on the device of `value`."""
    return _reduced(value, dist.ReduceOp.MAX)


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return value
    # NCCL reduces only tensors of a GPU.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else value.device
    result = value.to(device, copy=True)
    dist.all_reduce(result, op=operation)
    return result.to(value.device)


def all_values(values: Tensor) -> Tensor:
    """Concatenate the values [n] of all ranks, in their order, on every rank; n may differ."""
    return torch.cat([part.to(values.device) for part in all_gather([values.cpu()])])


def all_gather(items: list[T]) -> list[T]:
    """Concatenate the lists of all ranks, in their order, on every rank; items must pickle."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks, in place; a parameter without a gradient counts as zero.

    Call it once in an optimizer step, after the backward of every micro-batch, so that ranks may
    run different numbers of micro-batches, or none. It is a sum and not a mean because losses are
    divided by the denominators of all ranks. FSDP2 has summed the gradients of shards already.
    """
    if rank_and_size()[1] == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


class LocalError(TrainingStopped):
    """An error to raise on this rank only, because the others wait in another collective."""


_SAME = {kind.__name__: kind for kind in (ConfigurationError, TrainingStopped)}


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteError:
    """A description of one rank's error for the others; exceptions themselves may not pickle."""

    rank: int
    kind: str
    said: str
    signum: int = 0

    @classmethod
    def of(cls, error: BaseException) -> "RemoteError":
        """Describe an error of this rank."""
        rank, _ = rank_and_size()
        if isinstance(error, Interrupted):
            return cls(rank=rank, kind="", said="", signum=error.signum)
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        kind = "OutOfMemoryError" if is_memory else type(error).__name__
        return cls(rank=rank, kind=kind, said=str(error) if kind in _SAME else first_line(error))

    def error(self) -> BaseException:
        """The exception that the other ranks raise."""
        if self.signum:
            return Interrupted(self.signum)
        if self.kind in _SAME:
            return _SAME[self.kind](self.said)
        if self.kind == "OutOfMemoryError":  # either all ranks try again, or none
            return torch.OutOfMemoryError(f"rank {self.rank}: {self.said}")
        return RuntimeError(f"rank {self.rank}: {self.kind}: {self.said}")


@contextmanager
def share_errors() -> Iterator[None]:
    """Raise an error of any rank's block on all ranks, at the end of the block; a collective.

    So no rank waits in a later collective for one that failed. All raise the lowest rank's error:
    that rank its own exception, the others one of the same class and message
    (`ConfigurationError`, `TrainingStopped`, `Interrupted`, out of memory) or a `RuntimeError` that
    names rank and class. `LocalError`, `RankLost` and exceptions that end the process are raised
    at once, on this rank only.
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
        errors: the ranks' errors, in the order of ranks; None: no error.
        own: this rank's exception, which is raised itself if it is the first.
    """
    first = next((each for each in errors if each is not None), None)
    if first is None:
        return
    if own is not None and RemoteError.of(own) == first:
        raise own
    raise first.error() from own


class AbortVote:
    """Ranks agree through the process group's key-value store whether to abort a window.

    `scsdpo.interrupt` says what a window is. A collective could deadlock with one already under
    way. `compare_set` lets the first writer win: an aborting rank writes its signal, the last rank
    to arrive at the window's end writes "keep".
    """

    def __init__(self) -> None:
        self._store = dist.PrefixStore("scsdpo", default_store())
        self._arrived = -1

    @classmethod
    def of_ranks(cls) -> "AbortVote | None":
        """The vote of all ranks; None with one process."""
        return cls() if rank_and_size()[1] > 1 else None

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
                # All ranks have read the result of the window before, so it can go.
                self._store.delete_key(f"window/{window - 1}")
                self._store.delete_key(f"window/{window - 1}/there")
                return self._store.compare_set(key, "", "keep") == b"keep"
        return self._store.get(key) == b"keep" if self._store.check([key]) else None
