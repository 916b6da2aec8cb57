"""Read rows of files, of a saved folder or of a set on the hub, all at once or as a stream."""

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scsdpo.data.files import (
    BrokenRow,
    FileRows,
    format_of,
    is_part,
    looks_like_rows,
    of_arrow,
    read_rows,
)
from scsdpo.data.table import Table, check_file

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in a file's name that tell its split, by the rules of the Hugging Face hub."""

_BATCH = 1_000


@dataclass(frozen=True, kw_only=True)
class RowLocation:
    """The place of rows: a file that `read_rows` reads; several by a pattern (`shards/*.csv`),
    or all of a folder, in the natural order of their names; a folder that `datasets` saved; or the
    name of a set on the Hugging Face hub.

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

    def tables(self, wanted: Sequence[str]) -> Iterator[Table]:
        """All rows, in memory: a table for each file that has rows.

        Args:
            wanted: columns that are kept.

        Raises:
            FileNotFoundError, ValueError: if no rows are found.
        """
        empty = True
        for place, found in self._parts(wanted, streaming=False):
            rows, numbers = [], []
            for number, row in self._guarded(place, found.rows):
                if isinstance(row, BrokenRow):
                    raise ValueError(f"`{self.owner}`: cannot read {place}: {row}") from row
                rows.append(row)
                numbers.append(number)
            if rows:
                empty = False
                yield self._table(place, found, rows, numbers)
        if empty:
            self._table(self.path, None, [], [])  # raises

    def stream(self, wanted: Sequence[str]) -> Iterator[Table | BrokenRow]:
        """The rows one by one, each as a table of one row, or as a BrokenRow with the reason.

        Args:
            wanted: columns that are kept.

        Raises:
            FileNotFoundError, ValueError: as in `tables`; also later, if the file or the set, not
                only a row, cannot be read.
        """
        empty = True
        for place, found in self._parts(wanted, streaming=True):
            for number, row in self._guarded(place, found.rows):
                empty = False
                if isinstance(row, BrokenRow):
                    yield BrokenRow(f"`{self.owner}`: {place}, {row}")
                else:
                    yield self._table(place, found, [row], [number])
        if empty:
            self._table(self.path, None, [], [])  # raises

    def _table(
        self, place: str, found: FileRows | None, rows: list[Any], numbers: list[int]
    ) -> Table:
        return Table(
            owner=self.owner,
            place=place,
            rows=rows,
            unit=found.unit if found else "row",
            numbers=numbers,
            names=found.names if found else {},
        )

    def _guarded(self, place: str, rows: Iterable[Any]) -> Iterator[Any]:
        """The rows; an error names the last one that could be read."""
        number = 0
        try:
            for number, row in rows:
                yield number, row
        except (ValueError, OSError, RecursionError) as error:
            after = f" after row {number}" if number else ""
            raise ValueError(f"`{self.owner}`: cannot read {place}{after}: {error}") from error

    def _parts(self, wanted: Sequence[str], *, streaming: bool) -> Iterator[tuple[str, FileRows]]:
        """Name and rows of each file, or of the data set."""
        files = self._files()
        if files is None:
            yield self.path, self._of_dataset(wanted, streaming=streaming)
            return
        for file in files:
            check_file(file, self.owner)
            try:
                found = read_rows(file, wanted)
            except (ValueError, OSError, RecursionError) as error:
                raise ValueError(f"`{self.owner}`: cannot read {file}: {error}") from error
            yield str(file), found

    # --- files ----------------------------------------------------------------------------------

    def _files(self) -> list[Path] | None:
        """The files to read, in order; None: the path is a data set of `datasets`."""
        place = Path(self.path).expanduser()
        if place.is_dir():
            if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
                return None
            return self._of_folder(place)
        if place.is_file() or not glob.has_magic(self.path):
            if not place.is_file() and self._may_be_on_hub(place):
                return None
            found = [place]
        else:
            named = map(Path, glob.glob(str(place), recursive=True))
            found = sorted((file for file in named if file.is_file()), key=_natural)
            if not found:
                raise FileNotFoundError(f"`{self.owner}`: no file is named like {self.path}")
        if self.split != "train":
            raise ValueError(
                f"`{self.owner}`: a single file has no splits, and `split` is {self.split!r}: set "
                "`split` to `train`, its default, which reads the whole file; or name a folder "
                "whose files tell their splits (`test-00000.parquet`)"
            )
        return found

    def _may_be_on_hub(self, place: Path) -> bool:
        """True for `owner/name` without a file's suffix; no other path is sought on the hub."""
        return bool(re.fullmatch(r"[\w-]+/[\w.-]+", self.path)) and not looks_like_rows(place)

    def _of_folder(self, folder: Path) -> list[Path]:
        files = sorted(
            (
                file
                for file in folder.iterdir()
                if file.is_file() and looks_like_rows(file) and file.name[0] not in "._"
            ),
            key=_natural,
        )
        kinds = sorted({format_of(file) for file in files})
        if not files:
            inner = sorted(
                other.name
                for other in folder.iterdir()
                if other.is_dir() and any(map(looks_like_rows, other.iterdir()))
            )
            others = f"; there are some in {', '.join(inner)}" if inner else ""
            raise FileNotFoundError(
                f"`{self.owner}`: {folder} is a folder without files of rows (.jsonl, .csv, "
                f".parquet, ...){others}; name a file"
            )
        if len(kinds) > 1:
            raise ValueError(
                f"`{self.owner}`: {folder} holds files of several formats ({', '.join(kinds)}); "
                f"name those to read, such as {folder}/*{kinds[0]}"
            )
        known = [_splits_in(file.name) for file in files]
        if not any(known) and self.split == "train":
            return files
        wanted = _SPLITS.get(self.split, self.split)
        chosen = [file for file, told in zip(files, known, strict=True) if told[:1] == [wanted]]
        if not chosen:
            splits = ", ".join(sorted({told[0] for told in known if told})) or "no split"
            raise ValueError(
                f"`{self.owner}`: {folder} has no files of the split {self.split!r}: their names "
                f"tell {splits}"
            )
        return chosen

    # --- datasets -------------------------------------------------------------------------------

    def _of_dataset(self, wanted: Sequence[str], *, streaming: bool) -> FileRows:
        """The rows of a saved folder or of a set on the hub."""
        place = Path(self.path).expanduser()
        load = self._saved if place.is_dir() else self._on_hub
        found, schema = load(wanted, streaming=streaming)
        names = found.column_names
        if names is not None:  # some sets on the hub have no column names before they are read
            found = found.select_columns(_parts_of(names, wanted))
        batches = found.with_format("arrow").iter(_BATCH)
        return of_arrow(schema, batches, wanted)

    def _saved(self, wanted: Sequence[str], *, streaming: bool) -> tuple[Any, Any]:
        import datasets  # slow to import

        try:
            found = datasets.load_from_disk(str(Path(self.path).expanduser()))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"`{self.owner}`: cannot read {self.path}: {error}") from error
        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ValueError(
                    f"`{self.owner}`: {self.path} has no split {self.split!r}, only "
                    f"{', '.join(found)}"
                )
            found = found[self.split]
        elif self.split not in ("train", str(found.split)):
            raise ValueError(
                f"`{self.owner}`: {self.path} was saved without splits, and `split` is "
                f"{self.split!r}"
            )
        schema = found.features.arrow_schema
        return found.to_iterable_dataset() if streaming else found, schema

    def _on_hub(self, wanted: Sequence[str], *, streaming: bool) -> tuple[Any, Any]:
        import datasets
        import pyarrow
        from datasets.packaged_modules.parquet.parquet import ParquetConfig

        name = [self.subset] if self.subset else []
        settings: dict[str, Any] = {"split": self.split, "streaming": streaming}
        features = None
        try:
            if streaming:
                builder = datasets.load_dataset_builder(self.path, *name)
                features = builder.info.features
                if features and isinstance(builder.config, ParquetConfig):
                    settings["columns"] = _parts_of(list(features), wanted)
            found = datasets.load_dataset(self.path, *name, **settings)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"`{self.owner}`: there is no such file or folder, and the Hugging Face hub does "
                f"not give such a set ({error})"
            ) from error
        features = features or found.features
        return found, features.arrow_schema if features else pyarrow.schema([])


def _parts_of(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns that hold wanted values; if none does, the first, so that rows are counted."""
    return [name for name in names if is_part(name, wanted)] or list(names[:1])


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key that puts `part-2` before `part-10`."""
    pieces = re.split(r"(\d+)", str(path).lower())
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in pieces]


def _splits_in(name: str) -> list[str]:
    """The splits that the words of a file's name stand for."""
    return [_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS]
