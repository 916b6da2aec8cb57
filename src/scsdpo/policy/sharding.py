"""Weights sharded over the ranks (FSDP2): how a model is sharded, and gathered again.

A model is built on `meta`, sharded there, and filled shard by shard, so that no rank ever holds
all of it in float32. Each decoder layer is an FSDP unit, and the rest of the model (embedding, last
norm, head) is the root unit. A unit's weights are gathered while it runs. Gradients are summed over
ranks, not averaged, because losses are divided by the denominators of all ranks.
"""

import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy.decoder import decoder_of
from scsdpo.policy.quantization import plain_weight
from scsdpo.private.lightning import trainer_of
from scsdpo.private.transformers import fill_anew

T = TypeVar("T")


def flat_mesh(module: L.LightningModule) -> DeviceMesh | None:
    """The one-dimensional mesh over all ranks; None if weights are not sharded.

    Args:
        module: with or without a Trainer.

    Raises:
        ConfigurationError: if the mesh has another dimension, along which the weights of ranks
            would drift apart without an error; if the strategy is Lightning's FSDP or DeepSpeed.
    """
    trainer = trainer_of(module)
    if trainer is not None and isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigurationError(
            f"trainer.strategy: {type(trainer.strategy).__name__} is not supported: use "
            "FullySharded (configs/scale) to shard weights"
        )
    mesh = module.device_mesh
    if mesh is None:
        return None
    ranks = mesh["data_parallel"]
    if ranks.size() != mesh.size():
        raise ConfigurationError(
            f"trainer.strategy: weights must be sharded over all {mesh.size()} ranks, got "
            f"data_parallel_size {ranks.size()}: use FullySharded (configs/scale)"
        )
    return ranks


def is_sharded(module: nn.Module) -> bool:
    """True if weights are sharded (FSDP2), so that every forward is a collective."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    gathered: torch.dtype | None = None,
    *,
    on_host: bool = False,
) -> None:
    """Shard a model that is on `meta`, and allocate its shards, whose values are not set yet.

    Args:
        model: has all its parameters already; names and ties stay as they are.
        mesh: one-dimensional (`flat_mesh`).
        gathered: dtype in which a unit's weights are gathered; None: each parameter's own. Shards
            and summed gradients keep their dtype.
        on_host: keep shards in memory of the host, pinned if there is a GPU.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=gathered and torch.float32, cast_forward_inputs=False
    )
    host = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    offload = host if on_host else OffloadPolicy()
    # Units return keys and values that are views. Nothing is written into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (*decoder_of(model).layers, model):
        unit = fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # both gloo and NCCL support sums
    model.to_empty(device="cpu" if on_host else _device(mesh))
    _tie(model)
    _rebuild_buffers(model)
    model.__dict__["in_root_forward"] = MethodType(_do, model)
    register_fsdp_forward_method(model, "in_root_forward")
    for name, buffer in model.named_buffers():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, buffer.to(_device(mesh)))


def in_root_forward(model: PreTrainedModel, work: Callable[[PreTrainedModel], T]) -> T:
    """Do `work(model)` inside one root forward of FSDP2, where the root's weights are gathered.

    If the model is sharded, all ranks must call it, in the same order. Return tensors with a
    gradient in plain containers: FSDP2 looks there for the tensors at which a backward starts, to
    gather weights for it.
    """
    if isinstance(model, FSDPModule):
        return model.__dict__["in_root_forward"](work)
    return work(model)


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of every unit; after a forward the root's are still gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A weight dequantised, cast to `dtype` and gathered, without gradient.

    If it is sharded, this is a collective.

    Args:
        weight: a parameter, in 4 bits or not.
        dtype: None: no cast.
    """
    value = plain_weight(weight)
    value = value if dtype is None else value.to(dtype)
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_rows(parameter: Tensor) -> slice:
    """The rows of the gathered parameter that this rank holds."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    ranks, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    start = min(-(-len(parameter) // ranks) * rank, len(parameter))
    return slice(start, start + len(parameter.to_local()))


@torch.no_grad()
def whole(
    model: PreTrainedModel, skeleton: PreTrainedModel, narrow: torch.dtype | None = None
) -> PreTrainedModel:
    """Gather a copy of a sharded model, without gradient.

    Making the copy is a collective; using it is not.

    Args:
        model: sharded.
        skeleton: the model on `meta`; only its parameters are gathered.
        narrow: dtype of the linear layers' weights, to which autocast would cast them anyway.
    """
    reshard(model)
    plain = copy.deepcopy(skeleton)
    values = dict(model.named_parameters())
    for name, _ in list(plain.named_parameters()):
        owner, leaf = _owner(plain, name)
        value = values[name].detach()
        if narrow is not None and isinstance(owner, nn.Linear) and value.is_floating_point():
            value = value.to(narrow)
        value = value.full_tensor() if isinstance(value, DTensor) else value
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    for name, buffer in model.named_buffers():
        owner, leaf = _owner(plain, name)
        setattr(owner, leaf, buffer)
    _tie(plain)
    return plain


def _tie(model: PreTrainedModel) -> None:
    """Tie embedding and head again if the config ties them; transformers skips adapted ones."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        model.tie_weights()
    elif model.config.get_text_config().tie_word_embeddings:
        plain = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
        plain[1].weight = plain[0].weight


def _do(model: PreTrainedModel, work: Callable[[PreTrainedModel], T]) -> T:
    return work(model)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _rebuild_buffers(model: PreTrainedModel) -> None:
    """Compute buffers that checkpoints do not hold, such as rotary frequencies."""
    owners = [part for part in model.modules() if any(True for _ in part.buffers(recurse=False))]
    for owner in owners:
        for buffer in owner.buffers(recurse=False):
            buffer.fill_(torch.nan)
        fill_anew(model, owner)
    for name, buffer in model.named_buffers():
        if not bool(buffer.isfinite().all()):
            raise ConfigurationError(
                f"model.policy: {type(model).__name__} has a buffer ({name}) that cannot be "
                "computed again after sharding: use DDP (configs/scale/ddp.yaml)"
            )
