"""Rows of a file, with errors that say which argument is to be mended."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and where they come from.

    Args:
        owner: the class that reads the rows, as error messages name it.
        place: the file or set that holds them, as error messages name it.
        rows: one mapping from column to value each; at least one.

    Raises:
        ValueError: if there is no row.
    """

    owner: str
    place: str
    rows: list[Row]

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
        if not path.is_file():
            what = "is a folder; name a file in it" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"`{owner}`: {path} {what}")
        reader = _read_parquet if path.suffix == ".parquet" else _read_json
        try:
            rows = reader(path)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{owner}`: cannot read {path}: {error}") from error
        return cls(owner=owner, place=str(path), rows=rows)

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
        """
        self.check(column, self.owner)
        return [
            self._text(row.get(column), f"row {number}, column {column!r}", optional)
            for number, row in enumerate(self.rows, start=1)
        ]

    def _text(self, value: object, where: str, optional: bool) -> str:
        if optional and value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and (optional or value.strip()):
            return value
        raise ValueError(
            f"`{self.owner}`: {self.place}, {where} must be a text or a number, got {value!r}"
        )


def _read_json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    if text.lstrip().startswith("["):
        return [_row(row, f"item {number}") for number, row in enumerate(json.loads(text), start=1)]
    rows = []
    # Not `splitlines`, which also splits at characters that stand in JSON strings as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_row(json.loads(line), f"line {number}"))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
    return rows


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object with columns, but {type(value).__name__}")
    return value


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]  # comes with `datasets`, slow to import

    return pyarrow.parquet.read_table(path).to_pylist()
