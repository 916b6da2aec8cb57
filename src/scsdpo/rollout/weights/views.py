"""What of the policy's weights goes to an engine: all of them merged, the base, or the adapter.

Each view is a stream of (name, value) pairs in the checkpoint's names, rounded to the engine's
dtype, a layer at a time. Under shards every rank must read a view to its end, in step, for weights
are gathered; the policy's own weights are not touched.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scsdpo.policy import CausalLM
from scsdpo.policy.adapter import STUDENT
from scsdpo.policy.sharding import settle
from scsdpo.rollout.weights.hashing import GLIMPSE, digest

View = Callable[[CausalLM, torch.dtype], Iterator[tuple[str, Tensor]]]
"""Some of the policy's weights; a function that pickles."""


@torch.no_grad()
def merged_weights(
    policy: CausalLM, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the plain model; LoRA factors are merged into them.

    A tied head comes once, as the embedding.

    Args:
        policy: whose weights.
        dtype: to which they are rounded, before they are gathered; None: nothing is rounded.
    """
    model = policy.language_model
    settle(model)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    done: set[str] = set()
    for name, parameter in model.named_parameters():
        owner = next((a for a in adapted if name.startswith(f"{a}.")), "")
        if not owner:
            yield name, whole_weight(parameter, dtype)
        elif owner not in done:
            done.add(owner)
            for inner, value in merged_layer(adapted[owner]).named_parameters():
                yield f"{owner}.{inner}", value if dtype is None else value.to(dtype)


@torch.no_grad()
def base_weights(policy: CausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model without its adapters."""
    settle(policy.language_model)
    for name, parameter in policy.language_model.named_parameters():
        if _is_base(name):
            yield name.replace(".base_layer.", "."), whole_weight(parameter, dtype)


def base_digest(policy: CausalLM) -> str:
    """Tells the base from another; of evenly spread elements, for nothing trains it."""
    return digest(policy, GLIMPSE, _is_base)


@torch.no_grad()
def adapter_weights(policy: CausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every adapted layer's A and scale B, named after the layer.

    The scale (alpha / r, or alpha / sqrt(r)) is multiplied into B in float32, before the one
    rounding.
    """
    settle(policy.language_model)
    for name, layer in policy.language_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        factors = layer.lora_A[STUDENT], layer.lora_B[STUDENT]
        a, b = (whole_weight(factor.weight).float() for factor in factors)
        yield f"{name}.lora_A.weight", a.to(dtype)
        yield f"{name}.lora_B.weight", (b * layer.scaling[STUDENT]).to(dtype)


@torch.no_grad()
def merged_layer(layer: LoraLayer) -> nn.Module:
    """The plain layer that does what `layer` does with its adapter; a copy, whole under shards.

    Its weights are W + scale B A in float32, or in W's dtype if that is wider.
    """
    alone: Any = copy.deepcopy(layer)  # a LoraLayer is a mixin of modules
    for module in alone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = whole_weight(parameter)
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    alone.merge(adapter_names=[STUDENT])
    return alone.get_base_layer()


def whole_weight(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight itself, rounded to `dtype` if there is one, and gathered if it is sharded."""
    value = parameter.detach() if dtype is None else parameter.detach().to(dtype)
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_base(name: str) -> bool:
    return ".lora_" not in name
