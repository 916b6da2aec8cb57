"""Sharded checkpoints: folders in which each rank writes and reads its own part.

Such a folder holds the content of a file in the layout of torch.distributed.checkpoint: the tensors
`state_dict.NAME` and `optimizer.I.PARAMETER.STATE`, and everything else in `meta.pt`, which is
written last. Reading it gives a file's content, with tensors sharded over the reading ranks.
"""

import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from scsdpo.checkpoints import read_back
from scsdpo.errors import first_line
from scsdpo.private.torch import NAMES_IN_TABLES

META = "meta.pt"
"""File of everything but tensors; it is written last, so its presence means a complete folder."""
_TABLE = ".metadata"
"""File that lists where each part of each tensor is."""
_WEIGHTS, _OPTIMIZER = "state_dict", "optimizer"
_PUBLIC = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch": {"Size", *(n for n, v in vars(torch).items() if isinstance(v, torch.dtype))},
}
_KNOWN = {
    module: _PUBLIC.get(module, set()) | NAMES_IN_TABLES.get(module, set())
    for module in _PUBLIC.keys() | NAMES_IN_TABLES.keys()
}
"""Classes that a table may contain, by module."""

StoredTensors = dict[str, TensorStorageMetadata]
"""Shape and dtype of each tensor in a folder."""


def is_folder(path: Path) -> bool:
    """True if `path` is a complete sharded checkpoint."""
    return (path / META).is_file()


def write(content: dict[str, Any], path: Path, *, first: bool) -> None:
    """Write a checkpoint's content as a folder; every rank must call it and writes its own shards.

    Args:
        content: Lightning's dictionary; tensors are removed from it.
        path: a folder without files of another checkpoint.
        first: True on the rank that writes what is not sharded.

    Raises:
        OSError: on all ranks, if one of them could not write.
    """
    tensors = _take_tensors(content)
    path.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(tensors, checkpoint_id=path)
    except CheckpointException as error:
        raise OSError(_first_failure(error)) from error
    if first:
        read_back.save(content, path / META)


class Background:
    """A write during training, which every rank begins and finishes.

    The tensors are copied to the host first, so that the next step may change them.

    Args:
        content: as for `write`.
        path: as for `write`.
        group: a gloo process group for this write alone.
    """

    def __init__(self, content: dict[str, Any], path: Path, group: dist.ProcessGroup) -> None:
        tensors = _take_tensors(content)
        path.mkdir(parents=True, exist_ok=True)
        self._path, self._rest = path, io.BytesIO()
        read_back.save(content, self._rest)
        future = dcp.async_save(tensors, checkpoint_id=path, process_group=group)
        assert isinstance(future, Future)
        self._future = future

    def done(self) -> bool:
        """True if `finish` would not wait."""
        return self._future.done()

    def finish(self, *, first: bool) -> None:
        """Wait until the tensors are written, and write everything else.

        Raises:
            OSError: on all ranks, if one of them could not write.
        """
        try:
            self._future.result()
        except CheckpointException as error:
            raise OSError(_first_failure(error)) from error
        if first:
            (self._path / META).write_bytes(self._rest.getbuffer())


def read(
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    parameters: Sequence[Tensor] | None = None,
    optimizer: bool,
) -> dict[str, Any]:
    """The content of a folder; tensors in `weights` are filled in place.

    Args:
        path: of the folder.
        weights: plain or sharded tensors by name. Those that the folder has in the same shape are
            filled; the folder's other tensors are returned on `meta`. None: all are read whole.
        parameters: parameters of the optimizer in order; its states are sharded like them. None:
            its states are read whole.
        optimizer: False: optimizer states are not read.

    Raises:
        ValueError: if the folder is incomplete.
    """
    table = tables(path)
    content: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    wanted: dict[str, Tensor] = {}
    state = content[_WEIGHTS] = {}
    for name, stored in _of(table, _WEIGHTS).items():
        here = _empty(stored) if weights is None else weights.get(name)
        if here is None or here.shape != stored.size:
            state[name] = _empty(stored, "meta")
        else:
            state[name] = wanted[f"{_WEIGHTS}.{name}"] = here
    for name, stored in _of(table, _OPTIMIZER).items() if optimizer else ():
        number, index, kind = name.split(".", 2)
        like = None if parameters is None else parameters[int(index)]
        value = wanted[f"{_OPTIMIZER}.{name}"] = _state_like(like, stored)
        content["optimizer_states"][int(number)]["state"].setdefault(int(index), {})[kind] = value
    _fill(wanted, path, together=weights is not None)
    return content


def fill(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the folder's weights into `tensors`, by name, in a single process.

    Raises:
        ValueError: if the folder is incomplete.
    """
    _fill({f"{_WEIGHTS}.{name}": tensor for name, tensor in tensors.items()}, path, together=False)


def stored_weights(path: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a folder's weights, on `meta`.

    Raises:
        ValueError: if the folder is incomplete.
    """
    return {name: _empty(stored, "meta") for name, stored in _of(tables(path), _WEIGHTS).items()}


def tables(path: Path) -> StoredTensors:
    """Shape and dtype of each tensor in a folder, without reading them.

    Raises:
        ValueError: if the folder is incomplete: one of its files is missing or cut short.
    """
    try:
        known = _Reader(path).read_metadata()
        ends: dict[str, int] = {}
        for place in known.storage_data.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
        short = [name for name, end in ends.items() if (path / name).stat().st_size < end]
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise ValueError(f"{path} is incomplete: {first_line(error)}") from error
    if short:
        raise ValueError(f"{path} is incomplete: {min(short)} was not written to its end")
    found = known.state_dict_metadata.items()
    return {name: each for name, each in found if isinstance(each, TensorStorageMetadata)}


class _Reader(dcp.FileSystemReader):
    """Reads the table without executing its content, which plain `pickle` would do."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _TABLE).open("rb") as file:
            table = _Harmless(file).load()
        table.storage_meta = table.storage_meta or StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table


class _Harmless(pickle.Unpickler):
    """Unpickles the classes of a table only."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return PurePath
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{_TABLE} names {module}.{name}")


def _take_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """Take weights and optimizer states out of a checkpoint's content, by their flat names."""
    tensors = {f"{_WEIGHTS}.{name}": value for name, value in content.pop(_WEIGHTS).items()}
    rest = []
    for number, optimizer in enumerate(content.get("optimizer_states", ())):
        kept: dict[int, dict[str, Any]] = {}
        for index, states in optimizer["state"].items():
            for kind, value in states.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}.{number}.{index}.{kind}"] = value
                else:
                    kept.setdefault(index, {})[kind] = value
        rest.append(optimizer | {"state": kept})
    if "optimizer_states" in content:
        content["optimizer_states"] = rest
    return tensors


def _of(table: StoredTensors, kind: str) -> StoredTensors:
    start = f"{kind}."
    return {k.removeprefix(start): v for k, v in table.items() if k.startswith(start)}


def _empty(stored: TensorStorageMetadata, device: str = "cpu") -> Tensor:
    return torch.empty(stored.size, dtype=stored.properties.dtype, device=device)


def _state_like(parameter: Tensor | None, stored: TensorStorageMetadata) -> Tensor:
    if parameter is None or stored.size != parameter.shape:
        return _empty(stored)
    return torch.empty_like(parameter, dtype=stored.properties.dtype)


def _fill(wanted: dict[str, Tensor], path: Path, *, together: bool) -> None:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(wanted, storage_reader=_Reader(path), no_dist=not together)
    except CheckpointException as error:
        raise ValueError(f"{path} is incomplete: {_first_failure(error)}") from error


def _first_failure(error: CheckpointException) -> str:
    """A rank's own exception, without its traceback."""
    return first_line(next(iter(error.failures.values()))[0])
