"""Reading a checkpoint shard by shard, and the names and parts in which it holds weights."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import cached_file

from scsdpo.errors import ConfigurationError
from scsdpo.policy.names import is_factor, plain_name
from scsdpo.policy.sharding import local, own_rows
from scsdpo.private.transformers import conversions_at_load

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def load_shards(model: PreTrainedModel, path: str) -> None:
    """Fill a sharded model from a checkpoint in safetensors, except LoRA's factors.

    Each rank reads its own rows of each tensor. If the checkpoint splits a parameter in another way
    than the model, such as into one matrix for each expert, every rank reads and converts all of
    it, one parameter at a time.

    Args:
        model: sharded and allocated.
        path: local folder or hub name.

    Raises:
        ConfigurationError: if a tensor is missing or has another shape, or there are no
            safetensors.
    """
    with ExitStack() as files:
        stored = {
            name: file
            for where in _files(path)
            for file in [files.enter_context(safe_open(where, framework="pt"))]
            for name in file.keys()  # noqa: SIM118 - no mapping
        }
        named = model.named_parameters()
        wanted = {plain_name(name): value for name, value in named if not is_factor(name)}
        groups = _put_together(model, stored, wanted)
        for name, parameter in wanted.items():
            rows = own_rows(parameter)
            if name in groups:
                whole = groups[name]()
                _check_shape(path, name, tuple(whole.shape), parameter)
                local(parameter).copy_(whole[rows])
                continue
            if name not in stored:
                raise ConfigurationError(
                    f"{path} has no tensor {name}: another version of the architecture wrote the "
                    "checkpoint; load it and save it once with transformers"
                )
            table = stored[name].get_slice(name)
            _check_shape(path, name, tuple(table.get_shape()), parameter)
            if rows.start < rows.stop:
                local(parameter).copy_(table[rows])


def as_stored(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Convert weights of `model` to the names and parts that its checkpoint has.

    A parameter is only joined or split within one decoder layer, so that no more than one layer is
    held at a time.
    """
    conversions = conversions_at_load(model) or get_model_conversion_mapping(
        model, add_legacy=False
    )
    if not any(isinstance(each, WeightConverter) for each in conversions):
        yield from weights
        return
    for _, layer in groupby(weights, lambda pair: _LAYER.split(pair[0])[:2]):
        yield from revert_weight_conversion(model, dict(layer)).items()


_LAYER = re.compile(r"(\.layers\.\d+)\.")


def _put_together(
    model: PreTrainedModel, stored: Mapping[str, Any], wanted: Mapping[str, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Parameter -> function that reads it, if the checkpoint has another name or several parts.

    The conversions are those with which transformers loads the checkpoint.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, dict(wanted)
        )
        if target in wanted and target != name:
            parts.setdefault(target, []).append((name, pattern))

    def read(target: str) -> Tensor:
        names = parts[target]
        if names[0][1] is None:
            return stored[names[0][0]].get_tensor(names[0][0])
        converter = copy.deepcopy(by_pattern[names[0][1]])
        for name, pattern in names:
            assert pattern is not None
            converter.add_tensor(target, name, pattern, stored[name].get_tensor(name))
        made = converter.convert(target, model=model, config=model.config)[target]
        return made[0] if isinstance(made, list) else made

    return {target: partial(read, target) for target in parts}


def _check_shape(path: str, name: str, found: tuple[int, ...], parameter: Tensor) -> None:
    if found != tuple(parameter.shape):
        raise ConfigurationError(
            f"{path}: {name} has the shape {found}, but config.json means "
            f"{tuple(parameter.shape)}: use the config.json of these weights"
        )


def _files(path: str) -> list[str]:
    index = cached_file(path, _INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        one = cached_file(path, _ONE_FILE, _raise_exceptions_for_missing_entries=False)
        if one is None:
            raise ConfigurationError(
                f"{path} has neither {_ONE_FILE} nor {_INDEX}: only safetensors can be read shard "
                "by shard; load it and save it once with transformers"
            )
        return [one]
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [cached_file(path, name) for name in names]
