"""Write files atomically, and read JSON lines that a crash may have torn."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scsdpo.io.text import in_one_line


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically; its folder is made if needed.

    Raises:
        OSError: if the disk refuses; an older file stays.
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


def write_object(path: Path, found: object) -> None:
    """Write an object as JSON, atomically; `whole_object` reads it.

    Raises:
        OSError: if the disk refuses; an older file stays.
    """
    write_whole(path, json.dumps(found, indent=1) + "\n")


def whole_lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects in a file of one JSON object a line; none if there is no file.

    A last line without a newline may still be in writing and is omitted. A torn line, as a power
    cut leaves it (NULs, or half a line), is reported on standard error and skipped.

    Args:
        path: of the file.
        keys: keys that a line must have.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            found = parsed(line, *keys)
            if found is None:
                tell(f"{path}, line {number} is incomplete and was skipped")
            else:
                yield found


def whole_object(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a JSON file, with these keys; empty if there is none, or it is incomplete."""
    if not path.exists():
        return {}
    found = parsed(path.read_bytes(), *keys)
    if found is None:
        tell(f"{path} is incomplete and was skipped")
    return found or {}


def parsed(line: bytes, *keys: str) -> dict[str, Any] | None:
    """The object of a line, with these keys; None: it is incomplete. Leading NULs are ignored."""
    try:
        found = json.loads(line.strip(b"\0"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(key in found for key in keys) else None


def tell(text: str) -> None:
    """Print one line on standard error."""
    print(f"scsdpo: {in_one_line(text)}", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the same disk refuses this too
        return
