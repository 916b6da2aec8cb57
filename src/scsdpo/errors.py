"""Errors that end a run with one readable line instead of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from scsdpo.io.text import printable

MISTAKES = (ValueError, OSError, ImportError)
"""What a constructor raises when it was given something that cannot work. Anything else, and
these very errors once training runs (but for reading data), is a bug and keeps its traceback."""


DISK_FAULTS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EFBIG,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
}
"""Full, over quota, read-only, not ours, over a limit, broken, gone: no bug, wherever it is."""


class ConfigurationError(ValueError):
    """The user's configuration or data cannot work; the message names the key and the remedy."""


class TrainingStopped(RuntimeError):
    """The run stopped itself; the message says why and what to do."""


_NOTE = "scsdpo: "


def explain(error: BaseException, words: str) -> None:
    """Say what is behind `error`; the command shows that instead of a traceback."""
    error.add_note(f"{_NOTE}{words}")


def explanation(error: BaseException) -> str:
    """What `explain` said of it; '' if nothing."""
    notes = vars(error).get("__notes__", [])
    return next((note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)), "")


def first_line(error: BaseException) -> str:
    """What `error` says, at most 300 characters of its first line; its kind if it says nothing."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:300])


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Turn a mistake inside the block into a `ConfigurationError` that begins with `key`.

    For work that the constructor put off: opening and reading data, loading weights.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except MISTAKES as error:
        raise ConfigurationError(f"{key}: {error}") from error
