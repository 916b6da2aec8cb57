"""Rows of a file, with errors that say which argument is to be mended."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scsdpo.data.files import BrokenRow, Row, read_rows

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and where they come from.

    Args:
        owner: the class that reads the rows, as error messages name it.
        place: the file or set that holds them, as error messages name it.
        rows: one mapping from column to value each; at least one.
        unit: what they are counted in, "row" or "line".
        numbers: of each; empty: from 1.

    Raises:
        ValueError: if there is no row.
    """

    owner: str
    place: str
    rows: list[Row]
    unit: str = "row"
    numbers: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"`{self.owner}`: {self.place} has no rows; check how it was written")

    @classmethod
    def read(cls, path: Path, owner: str) -> "Table":
        """The rows of a file of JSON lines, a JSON list or Parquet.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it has no rows, or cannot be read; with the number of the broken line.
        """
        check_file(path, owner)
        rows, numbers = [], []
        try:
            unit, numbered = read_rows(path)
            for number, row in numbered:
                if isinstance(row, BrokenRow):
                    raise row
                rows.append(row)
                numbers.append(number)
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"`{owner}`: cannot read {path}: {error}") from error
        return cls(owner=owner, place=str(path), rows=rows, unit=unit, numbers=numbers)

    def number(self, index: int) -> int:
        """Number of the row at `index`."""
        return self.numbers[index] if self.numbers else index + 1

    def where(self, index: int) -> str:
        """What the row at `index` is called in errors."""
        return f"`{self.owner}`: {self.place}, {self.unit} {self.number(index)}"

    @property
    def columns(self) -> list[str]:
        """Names of the columns that any row has."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def check(self, column: str, argument: str) -> None:
        """Raise a ValueError on behalf of `argument` if no row has the column."""
        if column in self.columns:
            return
        close = difflib.get_close_matches(column, self.columns, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(map(repr, self.columns))
        raise ValueError(f"`{argument}`: {self.place} has no column {column!r}, only {names}{hint}")

    def texts(self, column: str, *, optional: bool = False) -> list[str]:
        """The values of a column, numbers spelled out.

        Args:
            column: its name.
            optional: values may be empty, or null, which gives "" too.

        Raises:
            ValueError: if there is no such column, or a value is not what it must be.
            BrokenRow: if a value is no text at all.
        """
        self.check(column, self.owner)
        return [
            self._text(row.get(column), f"{self.where(index)}, column {column!r}", optional)
            for index, row in enumerate(self.rows)
        ]

    def _text(self, value: object, where: str, optional: bool) -> str:
        if optional and value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and (half := _SURROGATE.search(value)):
            raise BrokenRow(
                f"{where} must be a text, got half a surrogate pair, {half[0]!r} at character "
                f"{half.start() + 1}"
            )
        if isinstance(value, str) and (optional or value.strip()):
            return value
        raise ValueError(f"{where} must be a text or a number, got {value!r}")


def check_file(path: Path, owner: str) -> None:
    """Raise a FileNotFoundError if there is no such file."""
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"`{owner}`: {path} {what}")
