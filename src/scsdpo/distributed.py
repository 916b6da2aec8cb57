"""Sums, maxima and agreements over ranks; with one process the former are the identity."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


class Agreement:
    """How ranks agree to give up a window (`scsdpo.interrupt`): by keys of the store they met at.

    Not by a collective, which a rank that waits in another one would never join. Who gives a window
    up writes so, unless "keep" stands there, which the last rank to arrive at its end writes.
    """

    def __init__(self) -> None:
        self._store = dist.PrefixStore("scsdpo", dist.distributed_c10d._get_default_store())
        self._arrived = -1

    @classmethod
    def of_ranks(cls) -> "Agreement | None":
        """None with one process."""
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
