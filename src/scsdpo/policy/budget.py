"""Memory of a forward and its backward, measured on few tokens and extrapolated to many."""

import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scsdpo.private.torch import DispatchMode, storage_key, tree_leaves

FEW, MORE = 64, 192
"""Numbers of tokens at which memory is measured."""


def memory_line(
    run: Callable[[int], Tensor], embedding: nn.Module, device: torch.device
) -> tuple[float, float]:
    """(fixed bytes, bytes a token) at the peak of a forward and its backward.

    The casts of weights that autocast makes count; gradients of weights do not. Memory is linear in
    the tokens, except for tables of attention scores, which `sdpa` does not make.

    Args:
        run: runs a forward over the given number of tokens, and returns the final hidden states.
        embedding: the model's; the backward goes down to its output.
        device: the model's.
    """

    def forward_backward(tokens: int) -> None:
        starts: list[Tensor] = []

        def start(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
            starts.append(embedded.detach().requires_grad_())
            return starts[-1]

        hook = embedding.register_forward_hook(start)
        try:
            # `trainer.predict` runs in inference mode.
            with torch.inference_mode(False), torch.enable_grad():
                hidden = run(tokens)
                # `backward` would change gradients that exist and call DDP's hooks.
                torch.autograd.grad(hidden.float().square().mean(), starts[-1:])
        finally:
            hook.remove()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        forward_backward(FEW)  # what the first run allocates and keeps must not count
        few, more = (peak_bytes(partial(forward_backward, n), device) for n in (FEW, MORE))
    slope = (more - few) / (MORE - FEW)
    return few - slope * FEW, slope


def free_bytes(device: torch.device) -> int:
    """Bytes of free memory of `device`, or of the host for a CPU."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Memory that the caching allocator holds without using it is free too.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that `work` allocates beyond what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        work()
    return live.peak


class _LiveBytes(DispatchMode):
    """Counts the bytes of storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {storage_key(storage) for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            key = storage_key(storage)
            if key not in given and key not in self._alive:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key)
        self.peak = max(self.peak, sum(self._alive.values()))
        return made


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]
