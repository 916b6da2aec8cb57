"""Reading a checkpoint shard by shard: each rank reads its own rows of each tensor."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from scsdpo.errors import ConfigurationError
from scsdpo.policy.adapter import is_factor, plain_name
from scsdpo.policy.sharding import local, own_rows

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def load_shards(model: PreTrainedModel, path: str) -> None:
    """Fill a sharded model from a checkpoint in safetensors; LoRA's factors are left alone.

    Args:
        model: sharded, with memory.
        path: local folder or hub name.

    Raises:
        ConfigurationError: if the checkpoint has other tensors than the model.
    """
    with ExitStack() as files:
        stored = {
            name: file
            for where in _files(path)
            for file in [files.enter_context(safe_open(where, framework="pt"))]
            for name in file.keys()  # noqa: SIM118 - no mapping
        }
        for name, parameter in _loaded(model):
            if name not in stored:
                raise ConfigurationError(
                    f"{path}: there is no tensor {name}: the checkpoint was written by another "
                    "version of the architecture; load it and save it once with transformers"
                )
            table = stored[name].get_slice(name)
            if tuple(table.get_shape()) != tuple(parameter.shape):
                raise ConfigurationError(
                    f"{path}: {name} has the shape {tuple(table.get_shape())}, and config.json "
                    f"says {tuple(parameter.shape)}"
                )
            rows = own_rows(parameter)
            if rows.start < rows.stop:
                local(parameter).copy_(table[rows])


def _loaded(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        if not is_factor(name):
            yield plain_name(name), parameter


def _files(path: str) -> list[str]:
    index = cached_file(path, _INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        one = cached_file(path, _ONE_FILE, _raise_exceptions_for_missing_entries=False)
        if one is None:
            raise ConfigurationError(
                f"{path} has no {_ONE_FILE} and no {_INDEX}: only safetensors can be read shard "
                "by shard; save it once with transformers"
            )
        return [one]
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [cached_file(path, name) for name in names]
