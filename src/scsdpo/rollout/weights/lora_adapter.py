"""The adapter of a LoRA policy by itself, beside base weights that an engine already has.

It is 2 percent of the merged weights at rank 32, and its small updates are not lost to the rounding
of the weights that they are added to.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.adapter import (
    STUDENT,
    adapted_ends,
    adapted_layers,
    is_factor,
    is_tied,
    plain_name,
)
from scsdpo.policy.shard_loading import as_stored
from scsdpo.policy.sharding import is_sharded, settle
from scsdpo.rollout.weights.versions import GLIMPSE
from scsdpo.rollout.weights.weights import StreamHash, digest, whole_weight

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""
_PREFIX = "base_model.model."
"""What peft's files put before a module's name."""
_MEMORY = Path("/dev/shm")


def why_not_alone(policy: CausalLM) -> str:
    """Why the policy's adapter cannot be brought by itself, naming the key; '' if it can."""
    adapter = policy.adapter
    if not isinstance(adapter, Lora):
        return "model.policy.adapter is no Lora, all weights are trained"
    if adapter.use_dora:
        return "vLLM does not know DoRA (model.policy.adapter.use_dora)"
    if adapter.r > RANKS[-1]:
        return f"vLLM knows ranks up to {RANKS[-1]} (model.policy.adapter.r is {adapter.r})"
    for name, layer in adapted_layers(policy.language_model).items():
        if isinstance(layer, ParamWrapper):
            return f"{name} is no layer (model.policy.adapter.target_parameters)"
        if name in adapted_ends(policy.language_model):
            return f"vLLM adapts no embedding and no head, and {name} has an adapter"
    return ""


Way = Literal["auto", "merged", "alone"]
"""How LoRA reaches an engine."""


def rank_for(policy: CausalLM, adapter: Way) -> int | None:
    """`max_lora_rank` of an engine with room for the adapter; None if it is merged.

    Args:
        policy: whose adapter; loaded, for its layers are looked at.
        adapter: the engine's argument.

    Raises:
        ConfigurationError: if it is to be `alone`, and cannot be; if embedding or head is adapted
            and they are one table.
    """
    model, why_not = policy.language_model, why_not_alone(policy)
    if (ends := adapted_ends(model)) and is_tied(model):
        raise ConfigurationError(
            f"model.policy.adapter.target_modules: {ends[0]} has an adapter, and embedding and "
            "head of this model are one table, which vLLM reads for both: leave it out, or sample "
            "with HFRollout"
        )
    if adapter == "alone" and why_not:
        raise ConfigurationError(f"model.rollout.engine.adapter: alone is not possible: {why_not}")
    if adapter == "merged" or why_not:
        return None
    assert isinstance(policy.adapter, Lora)
    return next(rank for rank in RANKS if rank >= policy.adapter.r)


@torch.no_grad()
def base_weights(policy: CausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight of the model without its adapters, rounded to `dtype`.

    Under shards every rank must ask for all of them, in step.
    """
    model = policy.language_model
    settle(model)
    plain = (
        (plain_name(name), whole_weight(parameter, dtype))
        for name, parameter in model.named_parameters()
        if _is_base(name)
    )
    yield from as_stored(model, plain)


def base_digest(policy: CausalLM) -> str:
    """Tells the base from another; of evenly spread elements, for nothing trains it."""
    return digest(policy, GLIMPSE, _is_base)


@torch.no_grad()
def adapter_weights(policy: CausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every adapted layer's A and scale B, named as in peft's files, rounded to `dtype`.

    The scale (alpha / r, or alpha / sqrt(r)) is multiplied into B in float32, before the one
    rounding. Under shards every rank must ask, in step.
    """
    settle(policy.language_model)
    for name, layer in policy.language_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a = whole_weight(layer.lora_A[STUDENT].weight)
        b = whole_weight(layer.lora_B[STUDENT].weight).float() * layer.scaling[STUDENT]
        yield f"{_PREFIX}{name}.lora_A.weight", a.to(dtype)
        yield f"{_PREFIX}{name}.lora_B.weight", b.to(dtype)


def check_targets(weights: dict[str, Tensor], supported: list[str]) -> None:
    """Refuse layers that the engine has no adapters for.

    Args:
        weights: of `adapter_weights`.
        supported: last parts of names of modules, as `WeightReceiver.scsdpo_describe` says.
    """
    targets = {name.split(".")[-3] for name in weights}
    if others := sorted(targets - set(supported)):
        raise ConfigurationError(
            f"model.policy.adapter.target_modules: vLLM has no adapters for {', '.join(others)} of "
            "this model: leave them out (exclude_modules), or set model.rollout.engine.adapter to "
            "merged"
        )


def write_adapter(weights: dict[str, Tensor], folder: Path) -> str:
    """Write what vLLM loads, as peft would, into a new `folder`; returns its `StreamHash`.

    The scale is in B already, hence alpha = r.
    """
    folder.mkdir(parents=True)
    rank = next(value.shape[0] for name, value in weights.items() if ".lora_A." in name)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[-3] for name in weights}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    values = {name: value.cpu().contiguous() for name, value in weights.items()}
    save_file(values, folder / "adapter_model.safetensors")
    return adapter_hash(values)


def adapter_hash(weights: dict[str, Tensor]) -> str:
    """`StreamHash` of factors by the place of their layer, which an engine may prefix otherwise."""
    stream = StreamHash()
    for name, value in weights.items():
        stream.add(name[name.find("layers.") :], value)
    return stream.hexdigest()


class MergeRounding:
    """Says once what of LoRA's change is lost when it is merged into rounded weights."""

    _LAYERS, _ENOUGH = 8, 0.9

    def __init__(self) -> None:
        self._looked = False

    def look(self, policy: CausalLM, dtype: torch.dtype) -> None:
        """At the first delivery that changes anything; not under shards or DoRA.

        Args:
            policy: about to be merged.
            dtype: of the engine's weights.
        """
        adapter = policy.adapter
        if self._looked or dtype.itemsize >= 4 or is_sharded(policy):
            return
        if not isinstance(adapter, Lora) or adapter.use_dora:
            return
        every = adapted_layers(policy.language_model).values()
        layers = [layer for layer in every if isinstance(layer.get_base_layer(), nn.Linear)]
        if not layers:
            return
        share = share_kept(layers[:: -(-len(layers) // self._LAYERS)], dtype)
        self._looked = share is not None
        if share is not None and share < self._ENOUGH:
            rank_zero_info(
                f"LoRA merged into {str(dtype).removeprefix('torch.')} weights for vLLM: of the "
                f"weights that it changes {share:.0%} come out changed, the rest is lost to "
                "rounding; model.rollout.engine.adapter: alone loses none"
            )


@torch.no_grad()
def share_kept(layers: Sequence[LoraLayer], dtype: torch.dtype) -> float | None:
    """Among weights with W + scale B A != W, the share that differs after both are rounded.

    Returns:
        In [0, 1]; None if nothing is changed.
    """
    changed = kept = 0
    for layer in layers:
        weight, delta = layer.get_base_layer().weight.float(), layer.get_delta_weight(STUDENT)
        changed += int((delta != 0).sum())
        kept += int(((weight + delta).to(dtype) != weight.to(dtype)).sum())
    return kept / changed if changed else None


@contextmanager
def folder_in_memory(needed: int) -> Iterator[Path]:
    """A folder in memory, where there is room for so many bytes; else on the disk."""
    parent = memory_or_disk(needed)
    with tempfile.TemporaryDirectory(prefix="scsdpo-adapter-", dir=parent) as folder:
        yield Path(folder)


def memory_or_disk(needed: int) -> Path:
    """Where files of so many bytes can lie for a while."""
    in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * needed
    return _MEMORY if in_memory else Path(tempfile.gettempdir())


def _is_base(name: str) -> bool:
    return not is_factor(name)
