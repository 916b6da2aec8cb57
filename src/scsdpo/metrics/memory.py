"""How much memory a process has had at most."""

import resource
import sys

import torch

GIB = 2**30


def peak_gib(device: torch.device) -> float:
    """Most GiB so far: of tensors on a GPU, elsewhere of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
