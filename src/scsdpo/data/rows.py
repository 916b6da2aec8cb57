"""Rows of a file, of a saved folder or of a set on the hub, at once or as a stream."""

import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scsdpo.data.table import Row, Table

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_log = logging.getLogger(__name__)


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
        return Table(owner=self.owner, place=self.path, rows=list(self._dataset(streaming=False)))

    def stream(self) -> Iterator[Row]:
        """One row after the other.

        Raises:
            FileNotFoundError, ValueError: as `table`.
        """
        if self._is_file and self._place.is_file() and self._place.stat().st_size:
            import datasets  # slow to import

            kind = _FORMATS.get(self._place.suffix, "json")
            files = str(self._place)
            yield from datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        elif self._is_file:
            Table.read(self._place, self.owner)  # says what is wrong
        else:
            yield from self._dataset(streaming=True)

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
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`{self.owner}`: neither a file or folder here nor a set that the Hugging Face "
                f"hub gives ({error})"
            ) from error


def good_rows(rows: Iterator[Row], owner: str, place: str) -> Iterator[Table]:
    """Each row of a stream as a table of its own; the caller skips those that are no good.

    Raises:
        ValueError: if there is no row.
    """
    first = next(rows, None)
    for row in itertools.chain([first] if first else [], rows):
        yield Table(owner=owner, place=place, rows=[row])
    if first is None:
        raise ValueError(f"`{owner}`: {place} has no rows; check how it was written")
