"""Integers that the host knows, sent to a device in one copy."""

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
