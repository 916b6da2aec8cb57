"""Rows of a file, of a saved folder or of a set on the hub, at once or as a stream."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scsdpo.data.files import BrokenRow, read_rows
from scsdpo.data.table import Table, check_file

_FORMATS = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where rows come from: a file of JSON lines, a JSON list or Parquet; a folder that
    `datasets` saved; or the name of a set on the Hugging Face hub.

    Args:
        path: any of these.
        owner: the class that reads the rows, as error messages name it.
        split: of a folder or a set.
        subset: of a set, which the hub calls its configuration; empty: the set has one only.
    """

    path: str
    owner: str
    split: str = "train"
    subset: str = ""

    def table(self) -> Table:
        """All rows, in memory.

        Raises:
            FileNotFoundError, ValueError: if there are none to be had.
        """
        if self._is_file:
            return Table.read(self._place, self.owner)
        rows = [row for table in self._of_dataset(streaming=False) for row in table.rows]
        return Table(owner=self.owner, place=self.path, rows=rows)

    def stream(self) -> Iterator[Table | BrokenRow]:
        """One row after the other, each as a table of its own; or what is wrong with it.

        Raises:
            FileNotFoundError, ValueError: as `table`; also on the way, if not a row but the file or
                the set cannot be read.
        """
        empty = True
        for row in self._of_file() if self._is_file else self._of_dataset(streaming=True):
            empty = False
            yield row
        if empty:
            Table(owner=self.owner, place=self.path, rows=[])  # raises

    def _of_file(self) -> Iterator[Table | BrokenRow]:
        check_file(self._place, self.owner)
        number, place = 0, str(self._place)
        try:
            unit, rows = read_rows(self._place)
            for number, row in rows:
                if isinstance(row, BrokenRow):
                    yield BrokenRow(f"`{self.owner}`: {place}, {row}")
                else:
                    yield Table(
                        owner=self.owner, place=place, rows=[row], unit=unit, numbers=[number]
                    )
        except (ValueError, OSError, RecursionError) as error:
            raise self._unreadable(number, error) from error

    def _of_dataset(self, *, streaming: bool) -> Iterator[Table]:
        number = 0
        rows = self._dataset(streaming=streaming)
        try:
            for number, row in enumerate(rows, start=1):
                yield Table(owner=self.owner, place=self.path, rows=[row], numbers=[number])
        except (ValueError, OSError) as error:
            raise self._unreadable(number, error) from error

    def _unreadable(self, number: int, error: Exception) -> ValueError:
        after = f" after row {number}" if number else ""
        return ValueError(f"`{self.owner}`: cannot read {self.path}{after}: {error}")

    @property
    def _place(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def _is_file(self) -> bool:
        """Or should be one: a path that looks like one is never sought on the hub."""
        if self._place.is_dir():
            return not any(
                (self._place / name).is_file() for name in ("state.json", "dataset_dict.json")
            )
        return (
            self._place.is_file()
            or not re.fullmatch(r"[\w-]+/[\w.-]+", self.path)
            or (self._place.suffix in _FORMATS)
        )

    def _dataset(self, *, streaming: bool) -> Any:
        import datasets  # slow to import

        try:
            if not self._place.is_dir():
                name = [self.subset] if self.subset else []
                return datasets.load_dataset(
                    self.path, *name, split=self.split, streaming=streaming
                )
            saved = datasets.load_from_disk(str(self._place))
            if isinstance(saved, datasets.DatasetDict):
                saved = saved[self.split]
            return saved.to_iterable_dataset() if streaming else saved
        except KeyError as error:
            raise ValueError(
                f"`{self.owner}`: {self.path} has no split {self.split!r}, only {', '.join(saved)}"
            ) from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"`{self.owner}`: neither a file or folder here nor a set that the Hugging Face "
                f"hub gives ({error})"
            ) from error
