"""Read a checkpoint without executing any of its content."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scsdpo.checkpoints import shards
from scsdpo.private.lightning import INSTANTIATOR

NUMBER = "number"
"""Key of `Saved.number` in a checkpoint."""
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint of `scsdpo fit`."""

    path: Path
    config: dict[str, Any]
    """The run's configuration by section; a checkpoint of weights only has the section `model`."""
    weights: dict[str, Tensor]
    """The module's state, memory-mapped; of a sharded checkpoint (a folder) on `meta`."""
    metrics: dict[str, float]
    """The last metrics logged; empty in a checkpoint of weights only."""
    step: int
    """Optimizer steps taken."""
    number: int
    """Number that increases over all checkpoints in a folder of runs; 0: an older version wrote
    it."""
    resumable: bool
    """True if training can resume from it; False for weights only."""

    @property
    def model(self) -> dict[str, Any]:
        """The configuration's section `model`."""
        return self.config["model"]

    @classmethod
    def read(cls, path: Path) -> "Saved":
        """Read a checkpoint, which may be sharded; then no tensor of it is read.

        Raises:
            ValueError: if there is none, it is incomplete, or it was not written by `scsdpo fit`.
        """
        sharded = shards.is_folder(path)
        if path.is_dir() and not sharded:
            raise ValueError(_folder(path))
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        file = path / shards.META if sharded else path
        stored = shards.stored_weights(path) if sharded else None
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            given = content["hyper_parameters"]
            model = {k: v for k, v in given.items() if k != INSTANTIATOR}
            return cls(
                path=path,
                config=content.get("config", {}) | {"model": model},
                weights=content["state_dict"] if stored is None else stored,
                metrics=content.get("metrics", {}),
                step=content["global_step"],
                number=content.get(NUMBER, 0),
                resumable="lr_schedulers" in content,
            )
        except (pickle.UnpicklingError, RuntimeError, *_WRONG) as error:
            raise ValueError(_unreadable(path, file)) from error

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Write weights into `tensors`, by their names.

        Raises:
            ValueError: if the checkpoint is incomplete.
        """
        if self.path.is_dir():
            shards.fill(tensors, self.path)
            return
        for name, tensor in tensors.items():
            tensor.copy_(self.weights[name])


def number(path: Path) -> int | None:
    """`Saved.number` of any checkpoint of Lightning; None if it is incomplete or no checkpoint."""
    try:
        if path.is_dir():
            shards.tables(path)
        file = path / shards.META if path.is_dir() else path
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return int(content.get(NUMBER, 0))
    except (pickle.UnpicklingError, RuntimeError, *_WRONG):
        return None


def checkpoint_in(path: Path) -> Path | None:
    """`path` itself if it is a checkpoint, or the last state of the run in it; None: neither."""
    last = path / "checkpoints" / "last.ckpt"
    if last.exists():
        return last
    return path if path.is_file() or (path / shards.META).exists() else None


_WRONG = (KeyError, TypeError, EOFError, AttributeError, OSError, ValueError, IndexError)
"""Errors that `torch.load` and look-ups raise for files of other kinds."""


def _folder(path: Path) -> str:
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return f"{path} is an exported policy; name it in model.policy.name_or_path"
    if any(path.glob("*.distcp")):
        return f"{path} is incomplete: it was not written to its end"
    held = sorted(path.rglob("last.ckpt"))
    hint = f"; did you mean {held[-1]}?" if held else ""
    return f"{path} is a folder{hint}"


def _unreadable(path: Path, file: Path) -> str:
    with file.open("rb") as start:
        begun = start.read(4)
    if begun in (b"", _ZIP):
        try:
            torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, *_WRONG):
            return f"{path} is incomplete: it was not written to its end"
    return f"{path} is not a checkpoint of `scsdpo fit`"
