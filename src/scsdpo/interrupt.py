"""Requests to stop the run, and the points at which it may stop.

A handler of signals asks (`ask`). Long work looks (`check`): inside a window, which is open from a
batch's first token to its first optimizer step, all that was done can be given up. On several
ranks a window ends where they would next wait for each other (`meet`), and all give it up or none.
"""

import time
from dataclasses import dataclass
from typing import Protocol

_LOOK_SECONDS = 0.1
"""Between two questions to the other ranks."""
_PATIENCE = 1800.0
"""Seconds that ranks wait for each other, as long as in a collective of torch."""


class Interrupted(BaseException):
    """The run was asked to stop, and has come to a place where it may.

    Args:
        signum: the signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"asked to stop by signal {signum}")
        self.signum = signum


class RankLost(RuntimeError):
    """Another rank is gone, and will not come to where this one waits for it."""


class Ranks(Protocol):
    """The agreement of several ranks."""

    def heard(self) -> int:
        """The signal that any rank was asked by, or 0."""

    def tell(self, signum: int) -> None:
        """Let the others hear it."""

    def give_up(self, window: int, signum: int) -> int:
        """Give up a window, unless all have come to its end; the signal, or 0 if it is kept."""

    def arrive(self, window: int) -> bool | None:
        """Say whether the window is kept; None: not all ranks have come to its end yet."""


@dataclass
class _Run:
    """The state of this process."""

    signum: int = 0
    """Asked by it; 0: was not asked."""
    told: bool = False
    """The other ranks know it."""
    under_way: bool = False
    """There is something to save or to finish, hence a signal only asks."""
    open: bool = False
    agreed: bool = True
    """The window that is open ends for all ranks together."""
    window: int = 0
    ranks: Ranks | None = None
    looked: float = 0.0
    lost: bool = False


_run = _Run()


def ask(signum: int) -> None:
    """Ask the run to stop; the first signal counts."""
    _run.signum = _run.signum or signum


def rank_lost() -> None:
    """Let whoever looks know that another rank is gone; from any thread."""
    _run.lost = True


def is_under_way() -> bool:
    """Say whether there is something to save or to finish, so that a signal only asks."""
    return _run.under_way


def begin_run(ranks: Ranks | None) -> None:
    """Begin a run: signals only ask from now on."""
    _run.under_way, _run.ranks = True, ranks


def reset() -> None:
    """Nobody asked, and nothing is under way."""
    vars(_run).update(vars(_Run()))


def open_window(*, agreed: bool = True) -> None:
    """Until `meet` or `close_window`, all that is done can be given up.

    Args:
        agreed: by all ranks or none. Without it each goes by itself, which suits work that no other
            rank waits for.
    """
    _run.window += 1
    _run.open, _run.agreed, _run.looked = True, agreed, 0.0
    check()


def close_window() -> None:
    """Close the window: what is done from here on cannot be given up."""
    _run.open = False


def check() -> None:
    """Give the window up if anyone asked.

    Raises:
        Interrupted: then, on every rank.
        RankLost: if another rank is gone.
    """
    if _run.lost:
        raise RankLost("another rank is gone")
    if _run.open and (signum := _asked()):
        if _run.ranks is not None and _run.agreed:
            signum = _run.ranks.give_up(_run.window, signum)
        if signum:
            raise Interrupted(signum)


def meet() -> None:
    """Wait for all ranks; then the window is closed. With one rank it stays open.

    Raises:
        Interrupted: on every rank, if one of them gave the window up.
        TimeoutError: if one of them does not come.
    """
    check()
    if _run.ranks is None:
        return
    limit = time.monotonic() + _PATIENCE
    while (kept := _run.ranks.arrive(_run.window)) is None:
        if time.monotonic() > limit:
            raise TimeoutError(f"a rank is lost: the others waited {_PATIENCE:g} s for it")
        time.sleep(0.002)
        check()
    if not kept:
        raise Interrupted(_run.ranks.give_up(_run.window, 0))
    close_window()


def _asked() -> int:
    if _run.ranks is None:
        return _run.signum
    now = time.monotonic()
    if _run.signum and not _run.told:  # before this rank gives up: the others wait for nobody then
        _run.ranks.tell(_run.signum)
        _run.told = True
    elif not _run.signum and now - _run.looked >= _LOOK_SECONDS:
        _run.looked = now
        _run.signum = _run.ranks.heard()
    return _run.signum
