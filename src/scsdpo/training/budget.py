"""Memory that runs out: work is done again with half the budget, which then grows back slowly."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from scsdpo.distributed import all_max
from scsdpo.errors import TrainingStopped, first_line
from scsdpo.policy.sharding import is_sharded

T = TypeVar("T")

CALM = 50
"""Successes in a row after which a budget that was halved is doubled."""
REMEDY = (
    "lower model.limits.max_tokens or model.sampling.max_new_tokens, set "
    "model.policy.gradient_checkpointing to true, or use model.policy.adapter Lora"
)
"""Of an update that does not fit."""
SAMPLING_REMEDY = (
    "lower max_new_tokens of model.sampling and model.val_sampling or data.max_prompt_tokens, or "
    "use VLLMRollout"
)
_SIGNS = (
    "can't allocate memory",  # the CPU's allocator, a plain RuntimeError
    "CUDA error: out of memory",  # outside torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(RuntimeError):
    """Memory ran out, and every rank that must know does.

    Args:
        said: the allocator's words.
        here: whether it ran out on this rank.
    """

    def __init__(self, said: str, *, here: bool = True) -> None:
        super().__init__(said)
        self.here = here


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def noticed() -> Iterator[None]:
    """Memory that runs out inside the block is `OutOfMemory`, on this rank alone."""
    said = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = first_line(error)
    # Out of the handler the traceback is gone, and with it the tensors of its frames.
    if said:
        raise OutOfMemory(said)


@contextmanager
def agreed(policy: nn.Module) -> Iterator[None]:
    """Memory that runs out inside the block on one rank is `OutOfMemory` on all, at its end.

    Every rank comes here; what may run out between two collectives needs an `agreed` of its own.

    Raises:
        OutOfMemory: on all ranks.
        TrainingStopped: on this rank, under shards: the others wait inside a forward's collective,
            and nothing can be agreed on.
    """
    said = ""
    try:
        with noticed():
            yield
    except OutOfMemory as error:
        said = str(error)
    if said and is_sharded(policy):
        raise TrainingStopped(
            f"out of memory ({said}) with weights sharded over devices, where a step cannot be "
            f"done again: {REMEDY}, or use more devices"
        )
    if bool(all_max(torch.tensor(float(bool(said))))):
        raise OutOfMemory(said or "on another rank", here=bool(said))


class Budget:
    """How much is worked on at a time: halved when memory runs out, given back slowly.

    Args:
        what: is counted, e.g. "tokens of a micro-batch".
        remedy: said when even the least is too much.
        together: whether all ranks do the work, and begin again, together.
    """

    def __init__(self, what: str, remedy: str, *, together: bool = False) -> None:
        self.what, self.remedy, self.together = what, remedy, together
        self._cap: int | None = None
        self._calm = 0

    def run(
        self, work: Callable[[int], T], *, most: int, extent: Callable[[], tuple[int, int]]
    ) -> T:
        """`work(budget)`, again with half of the budget where it raises `OutOfMemory`.

        Args:
            work: may be called again from the start. Its exception is the same on all ranks.
            most: the budget as configured.
            extent: the budget below which nothing changes, and that above which nothing does.

        Raises:
            TrainingStopped: if memory ran out twice at the least budget.
        """
        tried_least = False
        while True:
            budget = most if self._cap is None else min(most, self._cap)
            failure: tuple[str, bool] | None = None
            try:
                result = work(budget)
            except OutOfMemory as error:
                failure = str(error), error.here
            if failure is None:
                self._recover(most)
                return result
            _free_caches()
            said, here = failure
            least, useful = extent()
            at_least = here and budget <= least
            if self._anywhere(at_least and tried_least):
                raise TrainingStopped(
                    f"out of memory at the smallest budget too ({said}): {self.remedy}"
                )
            tried_least = at_least
            if here:
                self._halve(min(budget, max(useful, least)), least, said)

    def _anywhere(self, hopeless: bool) -> bool:
        return bool(all_max(torch.tensor(float(hopeless)))) if self.together else hopeless

    def _halve(self, used: int, least: int, said: str) -> None:
        self._cap, self._calm = max(used // 2, least), 0
        warnings.warn(
            f"out of memory ({said}): trying again with {self._cap} {self.what} instead of {used}",
            stacklevel=2,
        )

    def _recover(self, most: int) -> None:
        if self._cap is None:
            return
        self._calm += 1
        if self._calm >= CALM:
            self._cap, self._calm = 2 * self._cap, 0
            if self._cap >= most:
                self._cap = None


def _free_caches() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
