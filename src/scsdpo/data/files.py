"""Read the rows of a file one by one, each with its number; a broken row is returned, not raised.

Only the wanted columns are kept; formats that can skip columns do not read the others. A nested
column is named by dots, `reward_model.ground_truth`, and an element of a list by its number,
`final_answer.0`; a column whose own name has dots is found first.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

Row = dict[str, Any]
"""Values of the wanted columns that the row has, by the wanted name."""


class BrokenRow(ValueError):
    """A row that cannot be parsed or decoded; reading can go on after it."""


Numbered = Iterator[tuple[int, Row | BrokenRow]]
"""Rows with the number under which an error names them."""


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """The rows of a file, or of a data set.

    Iterating `rows` raises OSError or ValueError if the file, not only a row, cannot be read.
    """

    unit: str
    """Unit of the numbers: "line" or "row"."""
    names: dict[str, None]
    """Column names, nested ones by dots: all, or those of the rows read so far."""
    rows: Numbered


_BATCH = 1_000
"""Number of rows of a columnar file that are in memory at once."""

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COLUMNAR = (".parquet", ".arrow", ".feather")
_JSON = (".json", ".jsonl", ".ndjson")
_TOLD = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "a zip archive, as Excel's files are too; unpack it, or save its table as .csv",
    b"\x1f\x8b": "compressed by gzip; add .gz to its name",
    b"PAR1": "Parquet; add .parquet to its name",
}
"""First bytes of files in formats that are not read, and the remedy."""


def format_of(path: Path) -> str:
    """The suffix of a file's format in lower case, without that of its compression."""
    return uncompressed(path).suffix.lower()


def uncompressed(path: Path) -> Path:
    """The path without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path


def looks_like_rows(path: Path) -> bool:
    """True if `read_rows` reads files of this suffix."""
    return format_of(path) in (*_DELIMITERS, *_COLUMNAR, *_JSON)


def read_rows(path: Path, wanted: Sequence[str]) -> FileRows:
    """The rows of a file of comma- or tab-separated values, JSON lines, a JSON list, Parquet, Arrow
    or Feather, also compressed (.gz, .bz2, .xz, .zst). A file of any other suffix is read as JSON.

    Rows are read lazily; a JSON list is read whole.

    Args:
        path: the file.
        wanted: columns that are kept.

    Raises:
        OSError, ValueError: if the file cannot be opened, or has another format.
    """
    kind = format_of(path)
    if kind in _COLUMNAR:
        return _parquet(path, wanted) if kind == ".parquet" else _arrow(path, wanted)
    with _opened(path) as file:
        start = file.read(4)
    for beginning, what in _TOLD.items():
        if start.startswith(beginning):
            raise ValueError(f"it is {what}")
    if kind in _DELIMITERS:
        return _separated(path, wanted, _DELIMITERS[kind])
    with _opened(path) as file:
        first = next((line for line in _byte_lines(file) if line.strip()), b"")
    return (_list if first.lstrip().startswith(b"[") else _lines)(path, wanted)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; damaged compression raises an OSError."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # comes with `datasets`, slow to import

        file = cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression="zstd")))
    else:
        opening: dict[str, Callable[..., Any]] = {
            ".gz": gzip.open,
            ".bz2": bz2.open,
            ".xz": lzma.open,
        }
        file = opening.get(suffix, open)(path, "rb")
    with closing(file):
        try:
            yield file
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise OSError(f"its compressed bytes are damaged ({error})") from error


def pick(row: Mapping[str, Any], column: str) -> Row:
    """{column: its value}; empty if the row has no such column."""
    if column in row:
        return {column: row[column]}
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return {}
    return {column: value}


def _picked(row: Mapping[str, Any], wanted: Iterable[str]) -> Row:
    return {name: value for column in wanted for name, value in pick(row, column).items()}


def _named(row: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Names of the columns, nested ones by dots."""
    for name, value in row.items():
        yield f"{within}{name}"
        if isinstance(value, Mapping):
            yield from _named(value, f"{within}{name}.")


def _not_utf_8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text ({error.reason} at byte {error.start})"


# --- JSON -----------------------------------------------------------------------------------------


def _byte_lines(file: IO[bytes]) -> Iterator[bytes]:
    # A binary file splits lines at "\n" only; JSON strings may hold other line separators.
    for number, line in enumerate(file):
        yield line if number else line.removeprefix(b"\xef\xbb\xbf")


def _lines(path: Path, wanted: Sequence[str]) -> FileRows:
    names: dict[str, None] = {}

    def rows() -> Numbered:
        with _opened(path) as file:
            for number, line in enumerate(_byte_lines(file), start=1):
                if line.strip():
                    yield number, _object(_line(line, f"line {number}"), names, wanted)

    return FileRows(unit="line", names=names, rows=rows())


def _line(line: bytes, where: str) -> Any:
    try:
        return _not_an_object(_of_json(line.decode().rstrip()), where)
    except UnicodeDecodeError as error:
        return BrokenRow(f"{where} {_not_utf_8(error)}")
    except json.JSONDecodeError as error:
        return BrokenRow(f"{where} is not JSON ({error.msg}: character {error.pos + 1})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 5,000 brackets
        return BrokenRow(f"{where} is not JSON ({error})")


def _of_json(text: str) -> Any:
    return json.loads(text, parse_float=_exact, object_pairs_hook=_pairs)


def _exact(text: str) -> Decimal:
    """A number exactly as written, which a float would round."""
    try:
        return Decimal(text)
    except ArithmeticError as error:
        raise ValueError(f"the number {text[:40]} is out of range") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {twice!r} twice")
    return found


def _list(path: Path, wanted: Sequence[str]) -> FileRows:
    with _opened(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"it {_not_utf_8(error)}") from error
    names: dict[str, None] = {}
    rows = enumerate(_of_json(text), start=1)
    return FileRows(
        unit="row",
        names=names,
        rows=(
            (number, _object(_not_an_object(row, f"row {number}"), names, wanted))
            for number, row in rows
        ),
    )


def _not_an_object(value: object, where: str) -> Any:
    if isinstance(value, dict):
        return value
    kind = type(value).__name__
    return BrokenRow(f"{where} is not a JSON object with columns, but {kind}")


def _object(value: Any, names: dict[str, None], wanted: Sequence[str]) -> Row | BrokenRow:
    if isinstance(value, BrokenRow):
        return value
    names.update(dict.fromkeys(_named(value)))
    return _picked(value, wanted)


# --- comma- and tab-separated values --------------------------------------------------------------

_MISSING_CELLS = ("", "nan", "NaN", "NaT", "<NA>")
"""Texts that pandas, numpy and Python write for a missing value."""
_AS_FLOATS_ARE_WRITTEN = re.compile(r"[+-]?\d+\.0|[+-]?\d+(\.\d+)?[eE][+-]?\d{1,3}")
_ESCAPED = re.compile("[\udc80-\udcff]")


def _separated(path: Path, wanted: Sequence[str], delimiter: str) -> FileRows:
    # The csv module's default limit is 131,072 characters a cell.
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as file:
        header = next(_cells(file, delimiter), (0, []))[1]
    if isinstance(header, BrokenRow):
        raise ValueError(str(header))
    header = [name.strip() for name in header]
    if len(header) == 1 and header[0] not in wanted:
        for other in (";", "\t", ","):
            if other in header[0] and other != delimiter:
                raise ValueError(f"its columns are separated by {other!r}, not by {delimiter!r}")
    for name in wanted:
        if header.count(name) > 1:
            raise ValueError(f"it names the column {name!r} {header.count(name)} times")

    def rows() -> Numbered:
        with _opened(path) as file:
            cells = _cells(file, delimiter)
            next(cells, None)
            for number, row in cells:
                if isinstance(row, list) and len(row) != len(header):
                    row = BrokenRow(
                        f"line {number} has {_count(len(row), 'cell')} and the first line "
                        f"{_count(len(header), 'column')}"
                    )
                if isinstance(row, BrokenRow):
                    yield number, row
                else:
                    yield number, _picked(dict(zip(header, map(_cell, row), strict=True)), wanted)

    return FileRows(unit="line", names=dict.fromkeys(header), rows=rows())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _cells(file: IO[bytes], delimiter: str) -> Iterator[tuple[int, list[str] | BrokenRow]]:
    """The cells of each row, with the number of its first line; closes the file."""
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = "its quotes are not closed" if "unexpected end" in str(error) else str(error)
                yield number, BrokenRow(f"line {number} cannot be read: {why}")
                continue
            if escaped := next(filter(None, map(_ESCAPED.search, row)), None):
                byte = ord(escaped[0]) - 0xDC00
                yield number, BrokenRow(f"line {number} is not UTF-8 text (byte 0x{byte:02x})")
            elif row:
                yield number, row


def _cell(text: str) -> str | Decimal | None:
    """None for a missing value, a number where the text is a float's, else the text unchanged."""
    if text in _MISSING_CELLS:
        return None
    return Decimal(text) if _AS_FLOATS_ARE_WRITTEN.fullmatch(text) else text


# --- Parquet, Arrow -------------------------------------------------------------------------------


def _parquet(path: Path, wanted: Sequence[str]) -> FileRows:
    import pyarrow.parquet  # comes with `datasets`, slow to import

    source = _seekable(path)
    with pyarrow.parquet.ParquetFile(source) as file:
        schema = file.schema_arrow
    columns = [_leaf(schema, name) for name in wanted]

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(_seekable(path)) as file:
            yield from file.iter_batches(_BATCH, columns=[name for name in columns if name])

    return of_arrow(schema, batches(), wanted)


def _seekable(path: Path) -> Any:
    """The path; for a compressed file, its whole content in memory."""
    if path.suffix.lower() not in _COMPRESSIONS:
        return path
    import pyarrow

    with _opened(path) as file:
        return pyarrow.BufferReader(file.read())


def _leaf(schema: Any, column: str) -> str:
    """The column path to read, for a nested column only its part; '': there is no such column."""
    import pyarrow

    if column in schema.names:
        return column
    read: list[str] = []
    fields: Any = schema
    for part in column.split("."):
        if not isinstance(fields, pyarrow.Schema | pyarrow.StructType):
            break  # a list is read whole
        place = fields.get_field_index(part)
        if place < 0:
            return ""
        read.append(part)
        fields = fields.field(place).type
    return ".".join(read)


def _arrow(path: Path, wanted: Sequence[str]) -> FileRows:
    import pyarrow

    schema = _ipc(path).schema
    heads = {_leaf(schema, name).partition(".")[0] for name in wanted}
    places = [place for place, name in enumerate(schema.names) if name in heads or name in wanted]

    def batches() -> Iterator[Any]:
        # An empty list would mean all columns, so one column is read where none is wanted.
        reader = _ipc(path, pyarrow.ipc.IpcReadOptions(included_fields=places or [0]))
        if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader

    return of_arrow(schema, batches(), wanted)


def _ipc(path: Path, options: Any = None) -> Any:
    """A reader of Arrow's file format (which is also Feather's) or of its stream format."""
    import pyarrow

    def source() -> Any:
        found = _seekable(path)
        return pyarrow.memory_map(str(path)) if found is path else found

    try:
        return pyarrow.ipc.open_file(source(), options=options)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_stream(source(), options=options)


def of_arrow(schema: Any, batches: Iterable[Any], wanted: Sequence[str]) -> FileRows:
    """Rows of Arrow's record batches or tables.

    Args:
        schema: of the whole file or data set.
        batches: record batches or tables of the columns that were read.
        wanted: columns that are kept.

    Raises:
        ValueError: if several columns have a name that is wanted.
    """
    for name in wanted:
        if schema.names.count(name) > 1:
            raise ValueError(f"it names the column {name!r} {schema.names.count(name)} times")

    def rows() -> Numbered:
        number = 0
        for batch in batches:
            kept = [place for place, name in enumerate(batch.schema.names) if is_part(name, wanted)]
            columns = {batch.schema.names[place]: _values(batch.column(place)) for place in kept}
            for index in range(batch.num_rows):
                number += 1
                row = {name: values[index] for name, values in columns.items()}
                broken = next((v for v in row.values() if isinstance(v, BrokenRow)), None)
                yield (
                    number,
                    BrokenRow(f"row {number} {broken}") if broken else _picked(row, wanted),
                )

    return FileRows(unit="row", names=dict.fromkeys(_schema_names(schema)), rows=rows())


def is_part(name: str, wanted: Iterable[str]) -> bool:
    """True if a column or a part of it is wanted."""
    return any(column == name or column.startswith(f"{name}.") for column in wanted)


def _schema_names(fields: Any, within: str = "") -> Iterator[str]:
    import pyarrow

    for field in fields:
        yield f"{within}{field.name}"
        if isinstance(field.type, pyarrow.StructType):
            yield from _schema_names(field.type, f"{within}{field.name}.")


def _values(column: Any) -> list[Any]:
    """The values of a column; a BrokenRow with the reason stands for one that cannot be read."""
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):  # some value cannot be read; find which
        values = list(map(_value, column))
    return [_shortest(value, column.type) for value in values]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BrokenRow(_not_utf_8(error))
    except (ValueError, OverflowError) as error:
        return BrokenRow(f"holds a {scalar.type} that cannot be read ({error})")


def _shortest(value: Any, kind: Any) -> Any:
    """Floats of 16 and 32 bits with their shortest digits: 0.1, and not 0.10000000149011612."""
    import pyarrow.types

    if isinstance(value, float):
        while hasattr(kind, "value_type"):  # dictionary-encoded
            kind = kind.value_type
        if pyarrow.types.is_float32(kind):
            return Decimal(str(np.float32(value)))
        return Decimal(str(np.float16(value))) if pyarrow.types.is_float16(kind) else value
    if isinstance(value, dict) and isinstance(kind, pyarrow.StructType):
        return {
            name: _shortest(inner, kind.field(place).type)
            for place, (name, inner) in enumerate(value.items())
        }
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_shortest(inner, kind.value_type) for inner in value]
    return value
