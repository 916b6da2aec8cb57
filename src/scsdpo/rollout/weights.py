"""The policy's weights as an engine of its own loads them, and how two copies are told apart."""

import copy
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scsdpo.policy import CausalLM
from scsdpo.policy.adapter import STUDENT
from scsdpo.policy.sharding import is_sharded, local, settle

_WRAPPED = ".base_layer"
"""What peft puts into the name of a layer that has an adapter."""


@torch.no_grad()
def digest(policy: nn.Module) -> str:
    """16 hexadecimal digits that tell these weights from those before or after a step.

    Made of each parameter's bits (their exclusive or) and sum. It is the same on every rank, after
    a restart, and in every process that holds these weights on the same kind of device. A count of
    in-place writes would not do: fused optimizers write without being counted.
    """
    settle(policy)
    parameters = [local(p) for p in policy.parameters()]
    # A rank that has nothing of a parameter has its zero.
    bits = torch.stack(
        [torch.hash_tensor(p if p.numel() else p.new_zeros(1)) for p in parameters]
    ).tolist()
    sums = torch.stack([p.sum().double() for p in parameters]).tolist()
    parts: list[object] = [bits, sums]
    if is_sharded(policy):
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, [bits, sums])
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def merged_weights(policy: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight of the plain model; LoRA factors are merged into them.

    W + scale B A is formed in float32, on a copy of one layer at a time: the policy's own weights
    are not touched, and nothing is rounded here. A tied head comes once, as the embedding. On
    several ranks everyone must ask for all of them, in step: sharded weights are gathered.
    """
    model = policy.language_model
    settle(model)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    done: set[str] = set()
    for name, parameter in model.named_parameters():
        owner = next((a for a in adapted if name.startswith(f"{a}.")), "")
        if not owner:
            yield name, _whole(parameter)
        elif owner not in done:
            done.add(owner)
            for inner, value in _merged(adapted[owner]).named_parameters():
                yield f"{owner}.{inner}", value


def _whole(parameter: Tensor) -> Tensor:
    """The weight itself, gathered if it is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def _merged(layer: nn.Module) -> nn.Module:
    """The plain layer that does what `layer` does with its adapter."""
    assert isinstance(layer, LoraLayer)
    alone = copy.deepcopy(layer)
    for module in alone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_whole(parameter).float(), requires_grad=False))
    alone.merge(safe_merge=True, adapter_names=[STUDENT])
    return alone.get_base_layer()
