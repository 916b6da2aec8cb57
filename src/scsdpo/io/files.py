"""Files that a process writes whole, and lines of JSON that another one may have left torn."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scsdpo.io.text import in_one_line


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole under its name, or not there; its folder is made if need be.

    Raises:
        OSError: if the disk refuses; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def whole_lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects in a file of one JSON object a line; none if there is no file.

    A last line without its end may still be being written and is left out. One that is torn, as a
    power cut leaves it (NULs, or half a line), is named on standard error and passed over.

    Args:
        path: of the file.
        keys: that a line must have.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            found = parsed(line, *keys)
            if found is None:
                tell(f"{path}, line {number} is torn, and passed over")
            else:
                yield found


def whole_object(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a file of JSON, with these keys; empty if there is no file, or it is torn."""
    if not path.exists():
        return {}
    found = parsed(path.read_bytes(), *keys)
    if found is None:
        tell(f"{path} is torn, and passed over")
    return found or {}


def parsed(line: bytes, *keys: str) -> dict[str, Any] | None:
    """The object of a line that has these keys; None: it is torn. NULs before it are none of it."""
    try:
        found = json.loads(line.strip(b"\0"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(key in found for key in keys) else None


def tell(text: str) -> None:
    """One line on standard error."""
    print(f"scsdpo: {in_one_line(text)}", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the same disk refuses this too
        return
