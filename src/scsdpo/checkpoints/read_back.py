"""What is written is read back before it has a checkpoint's name."""

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from scsdpo.errors import ConfigurationError, first_line

_FAULTS = (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError)
"""What has no pickle, and what `weights_only` does not load; a disk's faults are others."""
_KINDS = "tensors, numbers, strings, lists and dicts can be"


def save(content: dict[str, Any], file: Path | io.BytesIO) -> None:
    """Write a checkpoint's content so that a run can go on from it.

    A callback whose state cannot be read back is named, and its state is left out.

    Args:
        content: as Lightning makes it.
        file: to write, from its beginning.

    Raises:
        ConfigurationError: if anything else cannot be read back, naming its key.
        OSError, RuntimeError: if the disk refuses.
    """
    callbacks = content.get("callbacks", {})
    for name, state in [*callbacks.items()]:
        if fault := _fault(state, io.BytesIO()):
            del callbacks[name]
            warnings.warn(
                f"what the callback {name} keeps cannot be read back and is left out of "
                f"checkpoints: a run that goes on begins it anew ({fault}; {_KINDS})",
                stacklevel=2,
            )
    if fault := _fault(content, file):
        odd = [key for key, value in content.items() if _fault(value, io.BytesIO())]
        raise ConfigurationError(
            f"checkpoint: {', '.join(odd) or 'its content'} cannot be read back: {fault}; {_KINDS}"
        )


def _fault(content: Any, file: Path | io.BytesIO) -> str:
    """Why `content` cannot be read back from where it was written now; '' if it can."""
    try:
        _write(content, file)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        mapped = isinstance(file, Path)  # tensors are not read then, but for their places
        torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except _FAULTS as error:
        return _reason(error)
    return ""


def _write(content: Any, file: Path | io.BytesIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError:  # torch counts bytes, and does not say why some are missing
        if isinstance(file, Path):
            with file.open("ab") as end:
                end.write(bytes(2**16))
                end.flush()
                os.fsync(end.fileno())
        raise


def _reason(error: Exception) -> str:
    """The sentence of torch's long message that says which kind it is."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "WeightsUnpickler error:" in line]
    if not told:
        return first_line(error)
    return told[0].partition("WeightsUnpickler error:")[2].partition(" was not an")[0].strip()
