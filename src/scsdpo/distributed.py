"""Sums and maxima over ranks; with one process they are the identity."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


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
    ranks, hence the sum and not the mean.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
