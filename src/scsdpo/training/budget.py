"""When memory runs out, work is repeated with half the budget, which then grows back slowly."""

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
"""A halved budget is doubled after so many successes in a row."""
REMEDY = (
    "lower model.limits.max_tokens or model.sampling.max_new_tokens, set "
    "model.policy.gradient_checkpointing to true, or use model.policy.adapter Lora"
)
"""Remedy where an update does not fit into memory."""
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
    """Memory ran out. Where ranks work together, it is raised on all of them.

    Args:
        said: the allocator's words.
        here: it ran out on this rank.
    """

    def __init__(self, said: str, *, here: bool = True) -> None:
        super().__init__(said)
        self.here = here


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocator raised the error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Raise `OutOfMemory`, on this rank alone, if memory runs out inside the block."""
    said = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = first_line(error)
    # Behind the handler the traceback is freed, and with it the tensors of its frames.
    if said:
        raise OutOfMemory(said)


@contextmanager
def out_of_memory_on_all_ranks(policy: nn.Module) -> Iterator[None]:
    """Raise `OutOfMemory` on all ranks, at the block's end, if memory runs out inside it on one.

    A collective: every rank must enter. Work between two collectives needs a block of its own.

    Raises:
        OutOfMemory: on all ranks.
        TrainingStopped: on this rank alone, if weights are sharded: the others wait in a forward's
            collective, and cannot be told.
    """
    said = ""
    try:
        with as_out_of_memory():
            yield
    except OutOfMemory as error:
        said = str(error)
    if said and is_sharded(policy):
        raise TrainingStopped(
            f"out of memory ({said}). The weights are sharded, so the step cannot be repeated with "
            f"fewer tokens at a time: {REMEDY}, or use more devices"
        )
    if bool(all_max(torch.tensor(float(bool(said))))):
        raise OutOfMemory(said or "on another rank", here=bool(said))


class Budget:
    """How much is worked on at a time. It is halved when memory runs out, and grows back slowly.

    Args:
        what: name of what is counted, e.g. "tokens of a micro-batch".
        remedy: what the user can do if even the least budget is too much.
        together: all ranks do the work together, and begin again together.
    """

    def __init__(self, what: str, remedy: str, *, together: bool = False) -> None:
        self.what, self.remedy, self.together = what, remedy, together
        self._cap: int | None = None
        self._calm = 0

    def run(
        self, work: Callable[[int], T], *, most: int, extent: Callable[[], tuple[int, int]]
    ) -> T:
        """Return `work(budget)`; call it again with half the budget if it raises `OutOfMemory`.

        Args:
            work: can be called again from the start. If `together`, it raises on all ranks alike.
            most: the budget as configured.
            extent: gives two budgets: a smaller one than the first, or a larger one than the
                second, changes nothing.

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
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            said, here = failure
            least, useful = extent()
            at_least = here and budget <= least
            hopeless = at_least and tried_least
            if self.together:
                hopeless = bool(all_max(torch.tensor(float(hopeless))))
            if hopeless:
                raise TrainingStopped(
                    f"out of memory even with the fewest {self.what} ({said}): {self.remedy}"
                )
            tried_least = at_least
            if here:
                used = min(budget, max(useful, least))
                self._cap, self._calm = max(used // 2, least), 0
                warnings.warn(
                    f"out of memory ({said}): trying again with {self._cap} {self.what} instead of "
                    f"{used}",
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
