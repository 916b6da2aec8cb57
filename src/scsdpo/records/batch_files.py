"""A file of JSON lines for each batch, in a folder of bounded size."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scsdpo.records.folder import begin_path
from scsdpo.records.jsonl import json_line

_NAME = re.compile(r"([a-z]+)_(\d+)\.jsonl")


class BatchFiles:
    """`SPLIT_000012.jsonl` for batch 12, written by one process, atomically.

    When the files exceed `most_bytes`, those with the closest neighbours of the same split are
    removed, the oldest first. The rest still spans the run, in larger and larger steps.

    Args:
        folder: folder of the files, made with the first one.
        most_bytes: limit on the size of all files.
    """

    def __init__(self, folder: Path, most_bytes: float) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._sizes: dict[tuple[str, int], int] | None = None

    def write(self, split: str, batch: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the file of a batch, over an older one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content, path = b"".join(map(json_line, records)), self._path(split, batch)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sizes = self._known()
        sizes[split, batch] = len(content)
        total = sum(sizes.values())
        while total > self.most_bytes and (least := _least_missed(sizes)):
            total -= sizes.pop(least)
            self._path(*least).unlink(missing_ok=True)

    def begin(self, batch: int, checkpoint: str | Path | None) -> None:
        """Keep the files up to `batch` of a resumed run, and none for a new one (`begin_path`)."""
        begin_path(self.folder, batch, checkpoint)
        self._sizes = None
        self.cut(batch)

    def cut(self, batch: int) -> None:
        """Remove the files of later batches, and the remains of killed writes."""
        for split, number in [*self._known()]:
            if number > batch:
                self._path(split, number).unlink()
        for part in self.folder.glob("*.part"):
            part.unlink()
        self._sizes = None

    def _path(self, split: str, batch: int) -> Path:
        return self.folder / f"{split}_{batch:06d}.jsonl"

    def _known(self) -> dict[tuple[str, int], int]:
        """Sizes of the files, by split and batch."""
        if self._sizes is None:
            found = [(_NAME.fullmatch(path.name), path) for path in self.folder.glob("*.jsonl")]
            self._sizes = {
                (name[1], int(name[2])): path.stat().st_size for name, path in found if name
            }
        return self._sizes


def _least_missed(sizes: Mapping[tuple[str, int], int]) -> tuple[str, int] | None:
    """The file whose neighbours in its split are closest; None: none has two neighbours."""
    gaps = []
    for split in {split for split, _ in sizes}:
        numbers = sorted(number for each, number in sizes if each == split)
        for low, number, high in zip(numbers, numbers[1:], numbers[2:], strict=False):
            gaps.append((high - low, number, split))
    if not gaps:
        return None
    _, number, split = min(gaps)
    return split, number
