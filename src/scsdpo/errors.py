"""Errors that end a run with one readable line instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

MISTAKES = (ValueError, OSError, ImportError)
"""What a constructor raises when it was given something that cannot work. Anything else, and
these very errors once training runs (but for reading data), is a bug and keeps its traceback."""


class ConfigurationError(ValueError):
    """The user's configuration or data cannot work; the message names the key and the remedy."""


class TrainingStopped(RuntimeError):
    """The run stopped itself; the message says why and what to do."""


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
