"""Standard output and error that never end a command.

The reader of the output may end (`| head`, a pager, ssh), its disk may be full, the stream may be
closed from the start, and its encoding may lack a character. Output that cannot be written is lost,
and the command continues.
"""

import errno
import io
import os
import select
import sys
from typing import Any

_LOST: dict[int, OSError] = {}
"""Error that ended the writing of a stream, by its descriptor."""


class _Raw(io.FileIO):
    """A descriptor whose writes succeed: after a failure it leads to the null device."""

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            # A parent may have made the shared pipe or terminal non-blocking.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            _give_up(self.fileno(), error)
            return size


def guard() -> None:
    """Open closed standard streams, and let output and error drop what they cannot write.

    Call it first: a file that another library opens must not become descriptor 1 or 2.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    # Streams that a test has replaced stay as they are.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, 2)


def finish() -> OSError | None:
    """Flush both streams; returns the error that lost output, unless its reader left (EPIPE)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = _LOST.get(1)
    return None if lost is None or lost.errno == errno.EPIPE else lost


def _guarded(stream: Any, descriptor: int) -> io.TextIOWrapper:
    raw = _Raw(descriptor, "w", closefd=False)
    if stream is None:  # it was closed when the process started
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _give_up(descriptor: int, error: OSError) -> None:
    _LOST.setdefault(descriptor, error)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
    if descriptor == 1 and error.errno != errno.EPIPE:
        why = os.strerror(error.errno or 0)
        print(f"scsdpo: standard output cannot be written, and is lost: {why}", file=sys.stderr)
