"""How many tokens' activations fit in memory: measured on a few tokens, and drawn out."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scsdpo.private.torch import DispatchMode, storage_key, tree_leaves

FEW, MORE = 64, 192
"""Tokens that are probed."""


def memory_line(
    run: Callable[[int], Tensor], embedding: nn.Module, device: torch.device
) -> tuple[float, float]:
    """Bytes whatever the tokens, and bytes a token, at the peak of a forward and its backward.

    Gradients of weights are not among them; the casts of weights that autocast makes are.

    Memory is a straight line in the tokens but for tables of attention scores, which `sdpa` does
    not make.

    Args:
        run: a forward over so many tokens: final hidden states.
        embedding: of the model; the backward goes as far as its output.
        device: of the model.
    """

    def forward_backward(tokens: int) -> None:
        starts: list[Tensor] = []

        def start(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
            starts.append(embedded.detach().requires_grad_())
            return starts[-1]

        hook = embedding.register_forward_hook(start)
        try:
            # Lightning predicts in inference mode.
            with torch.inference_mode(False), torch.enable_grad():
                hidden = run(tokens)
                # Not `backward`: gradients that are there stay, and DDP's hooks asleep.
                torch.autograd.grad(hidden.float().square().mean(), starts[-1:])
        finally:
            hook.remove()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        forward_backward(FEW)  # what is made once and kept is no part of the line
        few, more = (peak_bytes(partial(forward_backward, n), device) for n in (FEW, MORE))
    slope = (more - few) / (MORE - FEW)
    return few - slope * FEW, slope


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` holds at a time, beyond what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        work()
    return live.peak


class _LiveBytes(DispatchMode):
    """Counts the storages that operations make until they are let go."""

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
