"""Let loggers and records fail without ending the run."""

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_info

from scsdpo.errors import first_line
from scsdpo.private.lightning import forget_writer
from scsdpo.private.tensorboard import is_writer

PAUSE = 60.0
"""Seconds without calls to a logger that failed, because a network timeout may take long."""
_VERBS = (
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "save",
    "after_save_checkpoint",
    "finalize",
)

Errors = type[Exception] | tuple[type[Exception], ...]


class Outage:
    """Tries work that may fail: reports the first failure, retries later, and reports recovery.

    Args:
        what: name of the work in messages.
        errors: exceptions that count as a failure; others are raised.
        pause: seconds without an attempt after a failure.
    """

    def __init__(self, what: str, errors: Errors, pause: float = 0.0) -> None:
        self.what, self.errors, self.pause = what, errors, pause
        self._since: float | None = None
        self.error: Exception | None = None
        """Error of the last attempt; None: it worked."""
        self.trying = False

    def attempt(self, work: Callable[[], Any], *, part: bool = False) -> bool:
        """Try `work`; True if it was done.

        Args:
            work: the work, which may fail.
            part: `work` is only a part, so its success does not mean recovery.
        """
        if self._since is not None and time.monotonic() < self._since + self.pause:
            return False
        self.trying = True
        try:
            work()
        except self.errors as error:
            if self._since is None:
                warnings.warn(
                    f"{self.what} failed, the run goes on and tries it again: "
                    f"{type(error).__name__}: {first_line(error)}",
                    stacklevel=2,
                )
            self._since, self.error = time.monotonic(), error
            return False
        finally:
            self.trying = False
        if part:
            return True
        self.error = None
        if self._since is not None:
            rank_zero_info(f"{self.what} works again")
            self._since = None
        return True


class _Guarded:
    """A method of a logger that never raises."""

    def __init__(self, verb: Callable[..., Any], logger: Logger, outage: Outage) -> None:
        self.verb, self.logger, self.outage = verb, logger, outage

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        written = self.outage.attempt(lambda: self.verb(*args, **kwargs))
        if not written and isinstance(self.logger, TensorBoardLogger):
            # Its writer repeats its first error; the next line opens a new one.
            forget_writer(self.logger)


def guard_logger(logger: Logger) -> None:
    """Make a logger's methods never raise; a failure loses lines of its log only."""
    if isinstance(logger.log_metrics, _Guarded):
        return
    outage = Outage(f"the logger {type(logger).__name__}", Exception, PAUSE)
    logger.__class__ = _opening_safely(type(logger), outage)
    for name in _VERBS:
        if hasattr(logger, name):
            setattr(logger, name, _Guarded(getattr(logger, name), logger, outage))
    if isinstance(logger, TensorBoardLogger):
        _silence_writers()


def _opening_safely(kind: type[Logger], outage: Outage) -> type[Logger]:
    """A subclass of a logger's class whose `experiment` does nothing while it cannot be opened.

    Inside a guarded method the failure counts as the method's.
    """
    own = getattr(kind, "experiment", None)
    if not isinstance(own, property) or own.fget is None:
        return kind
    open_own = own.fget

    def experiment(logger: Logger) -> Any:
        if outage.trying:
            return open_own(logger)
        opened: list[Any] = []
        tried = outage.attempt(lambda: opened.append(open_own(logger)))
        return opened[0] if tried else DummyExperiment()

    return type(
        kind.__name__, (kind,), {"experiment": property(experiment), "__doc__": kind.__doc__}
    )


def _silence_writers() -> None:
    """Suppress tracebacks of TensorBoard's writer threads, whose errors are raised again here."""
    before = threading.excepthook
    if isinstance(before, _ButWriters):
        return
    threading.excepthook = _ButWriters(before)


class _ButWriters:
    def __init__(self, before: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self.before = before

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        if not is_writer(args.thread):
            self.before(args)
