"""Rows of a file, one after the other, each with its number; a broken one is told, not raised."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
_BATCH = 1_000
"""Rows of a Parquet file in memory."""


class BrokenRow(ValueError):
    """A row that cannot be read at all, or whose text is none; whoever reads on skips it."""


Numbered = Iterator[tuple[int, Row | BrokenRow]]
"""Rows with the number under which an error names them."""


def read_rows(path: Path) -> tuple[str, Numbered]:
    """What the rows of a file are counted in, "line" or "row", and the rows.

    JSON lines and Parquet are read as they are needed; a JSON list is read whole.

    Raises:
        OSError, ValueError: here or on the way, if the file, not a row of it, cannot be read.
    """
    if path.suffix == ".parquet":
        return "row", _parquet(path)
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    if first.removeprefix(_BOM).lstrip().startswith(b"["):
        return "row", _list(path)
    return "line", _lines(path)


def _lines(path: Path) -> Numbered:
    with path.open("rb") as file:
        # A file of bytes ends its lines at "\n" only: others stand in JSON strings as they are.
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield number, _line(line, f"line {number}")


def _line(line: bytes, where: str) -> Row | BrokenRow:
    try:
        return _row(json.loads(line.decode().rstrip()), where)
    except UnicodeDecodeError as error:
        return BrokenRow(f"{where} is not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return BrokenRow(f"{where} is not JSON ({error.msg}: character {error.pos + 1})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 5,000 brackets
        return BrokenRow(f"{where} is not JSON ({error})")


def _list(path: Path) -> Numbered:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    yield from ((number, _row(row, f"row {number}")) for number, row in enumerate(rows, start=1))


def _row(value: object, where: str) -> Row | BrokenRow:
    if isinstance(value, dict):
        return value
    kind = type(value).__name__
    return BrokenRow(f"{where} is not a JSON object with columns, but {kind}")


def _parquet(path: Path) -> Numbered:
    import pyarrow.parquet  # comes with `datasets`, slow to import

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH):
            for index in range(batch.num_rows):
                number += 1
                yield number, _cells(batch, index, f"row {number}")


def _cells(batch: Any, index: int, where: str) -> Row | BrokenRow:
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: column[index].as_py() for name, column in columns}
    except UnicodeDecodeError as error:
        return BrokenRow(f"{where} is not UTF-8 text ({error.reason} at byte {error.start})")
