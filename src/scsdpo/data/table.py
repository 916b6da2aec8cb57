"""A table of rows, with errors that name the argument to correct."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from scsdpo.data.files import BrokenRow, Row, read_rows

_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST = 400
"""Limit on the digits before or after a number's point; a float of 64 bits has at most 324."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, with the names of their origin for error messages.

    Args:
        owner: the class that reads the rows, as error messages name it.
        place: the file or set that holds them, as error messages name it.
        rows: mappings from column to value; at least one.
        unit: unit of `numbers`, "row" or "line".
        numbers: number of each row; empty: they count from 1.
        names: columns of the file or set, whether read or not; those of the rows are known anyway.

    Raises:
        ValueError: if there is no row.
    """

    owner: str
    place: str
    rows: list[Row]
    unit: str = "row"
    numbers: Sequence[int] = ()
    names: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"`{self.owner}`: {self.place} has no rows; check how it was written")

    @classmethod
    def read(cls, path: Path, owner: str, wanted: Sequence[str]) -> "Table":
        """The rows of a file, of any format that `read_rows` knows.

        Args:
            path: the file.
            owner: as above.
            wanted: columns that are kept.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it has no rows, or cannot be read; with the number of the broken line.
        """
        check_file(path, owner)
        rows, numbers = [], []
        try:
            found = read_rows(path, wanted)
            for number, row in found.rows:
                if isinstance(row, BrokenRow):
                    raise row
                rows.append(row)
                numbers.append(number)
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"`{owner}`: cannot read {path}: {error}") from error
        return cls(
            owner=owner,
            place=str(path),
            rows=rows,
            unit=found.unit,
            numbers=numbers,
            names=found.names,
        )

    def number(self, index: int) -> int:
        """Number of the row at `index`."""
        return self.numbers[index] if self.numbers else index + 1

    def where(self, index: int, column: str = "") -> str:
        """Name of the row at `index`, or of a cell of it, for error messages."""
        row = f"`{self.owner}`: {self.place}, {self.unit} {self.number(index)}"
        return f"{row}, column {column!r}" if column else row

    @property
    def columns(self) -> list[str]:
        """Names of the columns, nested ones by dots."""
        return list(self.names | dict.fromkeys(name for row in self.rows for name in row))

    def check(self, column: str, argument: str) -> None:
        """Raise a ValueError on behalf of `argument` if no row has the column."""
        if column in self.columns:
            return
        close = difflib.get_close_matches(column, self.columns, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(map(repr, self.columns))
        raise ValueError(f"`{argument}`: {self.place} has no column {column!r}, only {names}{hint}")

    def text(
        self, index: int, column: str, *, optional: bool = False, as_json: bool = False
    ) -> str:
        """A cell as text: a number written in full, and a text unchanged.

        Args:
            index: of the row.
            column: its name.
            optional: it may be empty or missing (no such column, null, NaN), which gives "".
            as_json: a list, or a value with columns of its own, gives its JSON.

        Raises:
            ValueError: if the cell is no text or number; truth values, dates and bytes are refused,
                because an answer could spell them in several ways.
            BrokenRow: if the text cannot be encoded.
        """
        value, where = self.rows[index].get(column), self.where(index, column)
        if optional and is_missing(value):
            return ""
        if as_json and isinstance(value, dict | list):
            return json.dumps(value, ensure_ascii=False, default=_json)
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            number = spelled(value)
            if number:
                return number
        if isinstance(value, str) and (optional or value.strip()):
            return whole_text(value, where)
        raise ValueError(f"{where} must be a text or a number, got {_shown(value)}")


def whole_text(text: str, where: str) -> str:
    """The text; raises a BrokenRow if it holds half a surrogate pair, which has no encoding."""
    if half := _SURROGATE.search(text):
        raise BrokenRow(
            f"{where} must be a text, got half a surrogate pair, {half[0]!r} at character "
            f"{half.start() + 1}"
        )
    return text


def is_missing(value: object) -> bool:
    """True if a cell is null or NaN."""
    if isinstance(value, Decimal):
        return value.is_nan()
    return value is None or (isinstance(value, float) and math.isnan(value))


def spelled(number: int | float | Decimal) -> str:
    """A number in full with its shortest digits: 0.00001, and 42 for 42.0. '' if it is not finite,
    or beyond the range of a float of 64 bits.
    """
    if isinstance(number, int):
        return str(number)
    exact = Decimal(repr(float(number))) if isinstance(number, float) else number
    if not exact.is_finite() or abs(exact.adjusted()) > _LARGEST:
        return ""
    text = f"{exact:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _json(value: object) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise ValueError(f"{_shown(value)} has no form in JSON")


def _shown(value: object) -> str:
    shown = repr(value) if not isinstance(value, Decimal) else f"{value}"
    kind = (
        ""
        if value is None or isinstance(value, str | int | float | Decimal)
        else (f" ({type(value).__name__}); write it as the text of a right answer")
    )
    return (shown if len(shown) <= 60 else f"{shown[:57]}...") + kind


def check_file(path: Path, owner: str) -> None:
    """Raise a FileNotFoundError if there is no such file."""
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"`{owner}`: {path} {what}")
