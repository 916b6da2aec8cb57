"""Files of JSON lines that survive a crash of the writing process."""

import json
import math
import os
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from scsdpo.io.files import parsed, whole_lines, write_whole
from scsdpo.records.folder import begin_path

_LONGEST = 2**22
"""Number of bytes at the end of a file in which its last line is sought."""


class JsonLines:
    """A file of one JSON object a line, written by one process.

    Each line is on the disk before the next begins: a run that is killed leaves complete lines, and
    a full disk keeps those before. Each line has a `batch`, the number of batches of training
    questions asked so far. A number that is not finite is null.

    Args:
        path: path of the file; its folder is made if needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add a line for each record, or none if the disk refuses."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = b"".join(map(json_line, records))
        torn = not self._tail().endswith(b"\n")  # by a kill, or a power cut
        with self.path.open("ab") as file:
            end = file.seek(0, os.SEEK_END)
            _durably(file.fileno(), b"\n" * (torn and end > 0) + lines, end, b"")

    def extend(self, more: Mapping[str, Any]) -> None:
        """Add keys to the last line, or overwrite them; the line must exist and be complete."""
        last = self._tail()
        line = json_line(json.loads(last) | more)
        with self.path.open("r+b") as file:
            start = file.seek(0, os.SEEK_END) - len(last)
            _durably(file.fileno(), line, start, last)
            file.truncate(start + len(line))

    def cut(self, batch: int) -> None:
        """Keep the complete lines before the first whose `batch` is greater.

        Lines torn by a killed write or a power cut are reported and removed.
        """
        if not self.path.exists():
            return
        lines = whole_lines(self.path, "batch")
        kept = b"".join(map(json_line, takewhile(lambda line: line["batch"] <= batch, lines)))
        with self.path.open("r+b") as file:
            if file.read(len(kept)) == kept:  # no torn line before: truncating needs no space
                file.truncate(len(kept))
                os.fsync(file.fileno())
                return
        write_whole(self.path, kept.decode())

    def begin(self, batch: int, checkpoint: str | Path | None) -> None:
        """Keep the lines up to `batch` of a resumed run, and none for a new one (`begin_path`)."""
        begin_path(self.path, batch, checkpoint)
        self.cut(batch)

    @property
    def last(self) -> dict[str, Any]:
        """The last line; empty if there is none or it is incomplete."""
        return parsed(self._tail()) or {}

    def _tail(self) -> bytes:
        """The bytes of the last line; empty if there is no file."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _LONGEST, 0))
            return (file.read().splitlines(keepends=True) or [b""])[-1]


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of bytes; a number that is not finite is null."""
    text = json.dumps(with_nulls(record), ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which a row of data may hold, is escaped as in JSON.
    return text.encode(errors="backslashreplace") + b"\n"


def with_nulls(value: Any) -> Any:
    """Plain data for JSON: a number that is not finite is null, a tuple a list."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return value


def _durably(descriptor: int, content: bytes, at: int, before: bytes) -> None:
    """Write `content` at `at` and sync; if the disk refuses, restore what was there before."""
    try:
        _write_all(descriptor, content, at)
        os.fsync(descriptor)
    except OSError:
        _write_all(descriptor, before, at)  # needs no new blocks
        os.ftruncate(descriptor, at + len(before))
        raise


def _write_all(descriptor: int, content: bytes, at: int) -> None:
    """Write all bytes: a nearly full disk takes a part, and fails at the next write."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], at + written)
