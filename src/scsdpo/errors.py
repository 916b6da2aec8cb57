"""Errors that end a run with one readable line instead of a traceback."""


class ConfigurationError(ValueError):
    """The user's configuration or data cannot work; the message names the key and the remedy."""


class TrainingStopped(RuntimeError):
    """The run stopped itself; the message says why and what to do."""
