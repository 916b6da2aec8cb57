"""One rank's error, raised on all of them, so that none waits in a collective that never comes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from scsdpo.distributed import all_gather, place
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.interrupt import Interrupted, RankLost

_SAME = {kind.__name__: kind for kind in (ConfigurationError, TrainingStopped)}


class Alone(TrainingStopped):
    """An error that cannot be agreed on: other ranks wait inside a collective for this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """An error as other ranks hear of it; exceptions themselves need not pickle."""

    rank: int
    kind: str
    said: str
    signum: int = 0

    @classmethod
    def of(cls, error: BaseException) -> "Told":
        """Of this rank's error."""
        rank, _ = place()
        if isinstance(error, Interrupted):
            return cls(rank=rank, kind="", said="", signum=error.signum)
        kind = "OutOfMemoryError" if _is_memory(error) else type(error).__name__
        return cls(rank=rank, kind=kind, said=str(error) if kind in _SAME else first_line(error))

    def error(self) -> BaseException:
        """The same on a rank that has none of its own."""
        if self.signum:
            return Interrupted(self.signum)
        if self.kind in _SAME:
            return _SAME[self.kind](self.said)
        if self.kind == "OutOfMemoryError":  # and every rank tries again, or none
            return torch.OutOfMemoryError(f"rank {self.rank}: {self.said}")
        return RuntimeError(f"rank {self.rank}: {self.kind}: {self.said}")


@contextmanager
def agreed() -> Iterator[None]:
    """An exception inside the block on any rank is raised on all of them, at its end.

    Every rank comes here. The lowest rank's error is the one that all raise: its own exception
    there, elsewhere one of the same class and words (`ConfigurationError`, `TrainingStopped`,
    `Interrupted`, out of memory) or a `RuntimeError` that names rank and class. `Alone`, a lost
    rank and what ends the process are raised at once, on this rank only.
    """
    error: BaseException | None = None
    try:
        yield
    except (Alone, RankLost):
        raise
    except (Exception, Interrupted) as own:
        error = own
    raise_first(all_gather([None if error is None else Told.of(error)]), error)


def raise_first(told: list[Told | None], own: BaseException | None) -> None:
    """Raise the first error of those that ranks told of, in their order."""
    first = next((each for each in told if each is not None), None)
    if first is None:
        return
    if own is not None and Told.of(own) == first:
        raise own
    raise first.error() from own


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError)
