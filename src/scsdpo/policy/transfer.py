"""Copies of integer and bool tensors between host and device, several tensors in one copy."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy `tables` [n_i] int64 of the host to `device` in one copy.

    On CUDA the copy goes through pinned memory and is queued behind earlier work, so that the host
    does not wait. A copy from ordinary memory would wait until that work is done.
    """
    together = torch.cat(list(tables))
    if device.type == "cuda":
        together = together.pin_memory()
    sent = together.to(device, non_blocking=True)
    return list(sent.split([len(table) for table in tables]))


def download(tables: Sequence[Tensor]) -> list[Tensor]:
    """Copy `tables` (int64 or bool, of any shape) from their device; the host waits once."""
    together = torch.cat([table.flatten().long() for table in tables]).cpu()
    parts = together.split([table.numel() for table in tables])
    return [
        part.view(table.shape).to(table.dtype) for part, table in zip(parts, tables, strict=True)
    ]
