"""Integers and masks between host and device, in one copy each way."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`tables` [n_i] int64 of the host on `device`, in one copy.

    The host does not wait for it: on CUDA it goes through pinned memory, behind the work that is
    queued, where an ordinary copy would wait until that is done.
    """
    together = torch.cat(list(tables))
    if device.type == "cuda":
        together = together.pin_memory()
    sent = together.to(device, non_blocking=True)
    return list(sent.split([len(table) for table in tables]))


def download(tables: Sequence[Tensor]) -> list[Tensor]:
    """`tables` of a device, int64 or bool and of any shape, on the host: it waits once."""
    together = torch.cat([table.flatten().long() for table in tables]).cpu()
    parts = together.split([table.numel() for table in tables])
    return [
        part.view(table.shape).to(table.dtype) for part, table in zip(parts, tables, strict=True)
    ]
