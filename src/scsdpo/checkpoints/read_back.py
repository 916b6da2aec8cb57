"""Write a checkpoint's content, and read it back before it gets its name."""

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from scsdpo.errors import ConfigurationError, first_line

_FAULTS = (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError)
"""Errors of content that cannot be pickled, or not be loaded with `weights_only`; not a disk's."""
_KINDS = "tensors, numbers, strings, lists and dicts can be"


def save(content: dict[str, Any], file: Path | io.BytesIO) -> None:
    """Write a checkpoint's content so that a run can be resumed from it.

    If a callback's state cannot be read back, a warning names it and the state is omitted.

    Args:
        content: as Lightning makes it.
        file: the file to write, from its beginning.

    Raises:
        ConfigurationError: if anything else cannot be read back, naming its key.
        OSError, RuntimeError: if the disk refuses.
    """
    callbacks = content.get("callbacks", {})
    for name, state in [*callbacks.items()]:
        if fault := _fault(state, io.BytesIO()):
            del callbacks[name]
            warnings.warn(
                f"the state of the callback {name} cannot be read back and is left out of "
                f"checkpoints: a resumed run starts it anew ({fault}; {_KINDS})",
                stacklevel=2,
            )
    if fault := _fault(content, file):
        odd = [key for key, value in content.items() if _fault(value, io.BytesIO())]
        raise ConfigurationError(
            f"checkpoint: {', '.join(odd) or 'its content'} cannot be read back: {fault}; {_KINDS}"
        )


def _fault(content: Any, file: Path | io.BytesIO) -> str:
    """Write `content` and read it back; returns why that fails, or ''."""
    try:
        _write(content, file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        mapped = isinstance(file, Path)  # checks positions of tensors without reading them
        torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except _FAULTS as error:
        return _reason(error)
    return ""


def _write(content: Any, file: Path | io.BytesIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError:  # torch's message lacks the cause: a write of our own raises it
        if isinstance(file, Path):
            with file.open("ab") as end:
                end.write(bytes(2**16))
                end.flush()
                os.fsync(end.fileno())
        raise


def _reason(error: Exception) -> str:
    """The part of torch's long message that names the type."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "WeightsUnpickler error:" in line]
    if not told:
        return first_line(error)
    return told[0].partition("WeightsUnpickler error:")[2].partition(" was not an")[0].strip()
