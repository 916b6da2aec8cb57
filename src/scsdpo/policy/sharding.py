"""Weights in shards over the ranks (FSDP2): how a model is sharded, and made whole again.

Checkpoints, gradients and norms also read shards, as the DTensors that they are.

A model is built on `meta`, sharded there, and filled shard by shard, so that no rank ever holds
the whole of it in float32. Each decoder layer is a unit, and the rest of the model (embedding, last
norm, head) is its root; a unit is whole while it runs. Gradients are summed over ranks, not
averaged: losses are divided by the denominators of all ranks.
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
    """The one mesh over all ranks; None: weights are not sharded.

    Args:
        module: of a Trainer, or of none.

    Raises:
        ConfigurationError: if the ranks form any other mesh, along which weights of different
            ranks would move apart without an error; or for another way to shard.
    """
    trainer = trainer_of(module)
    if trainer is not None and isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ConfigurationError(
            "trainer.strategy: weights are sharded by FullySharded (configs/scale), not "
            f"by {type(trainer.strategy).__name__}"
        )
    mesh = module.device_mesh
    if mesh is None:
        return None
    ranks = mesh["data_parallel"]
    if ranks.size() != mesh.size():
        raise ConfigurationError(
            f"trainer.strategy: weights are sharded over all {mesh.size()} ranks, got "
            f"data_parallel_size {ranks.size()}: use FullySharded (configs/scale)"
        )
    return ranks


def is_sharded(module: nn.Module) -> bool:
    """Whether a weight is in parts on several ranks, so that a forward is a collective."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    gathered: torch.dtype | None = None,
    *,
    on_host: bool = False,
) -> None:
    """Shard a model that is on `meta`, and give it memory; its values are still to be written.

    Args:
        model: with every parameter that it will have; names and ties stay as they are.
        mesh: flat.
        gathered: dtype of whole units while they run; None: each parameter's own. Shards and
            summed gradients keep theirs.
        on_host: keep shards in memory of the host, pinned where there is a GPU.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=gathered and torch.float32, cast_forward_inputs=False
    )
    host = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    offload = host if on_host else OffloadPolicy()
    # Keys and values that come out are views; nothing is written into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (*decoder_of(model).layers, model):
        unit = fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # what gloo and NCCL both know
    model.to_empty(device="cpu" if on_host else _device(mesh))
    _tie(model)
    _rebuild_buffers(model)
    model.__dict__["inside"] = MethodType(_inside, model)
    register_fsdp_forward_method(model, "inside")
    for name, buffer in model.named_buffers():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, buffer.to(_device(mesh)))


def inside(model: PreTrainedModel, work: Callable[[PreTrainedModel], T]) -> T:
    """Do `work` where weights are whole; under shards every rank must, in the same order.

    Tensors with a gradient come out in plain containers: in these FSDP2 finds where a backward will
    start, and gathers weights for it.
    """
    return model.__dict__["inside"](work) if isinstance(model, FSDPModule) else work(model)


def reshard(module: nn.Module) -> None:
    """Put every unit back into shards; after a forward the root is whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank has of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of a weight in plain numbers, without gradient; rounded to `dtype`, and then gathered.

    Under shards every rank must ask.

    Args:
        weight: a parameter, in 4 bits or not.
        dtype: None: nothing is rounded.
    """
    value = plain_weight(weight)
    value = value if dtype is None else value.to(dtype)
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_rows(parameter: Tensor) -> slice:
    """Which of the whole parameter's rows this rank has."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    ranks, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    start = min(-(-len(parameter) // ranks) * rank, len(parameter))
    return slice(start, start + len(parameter.to_local()))


@torch.no_grad()
def whole(
    model: PreTrainedModel, skeleton: PreTrainedModel, narrow: torch.dtype | None = None
) -> PreTrainedModel:
    """A plain copy with whole weights, without gradient; a collective, the copy's use is not.

    Args:
        model: sharded.
        skeleton: the same on `meta`; its parameters are those that are wanted.
        narrow: dtype of linear layers' weights, to which autocast would cast them anyway.
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
    """Make embedding and head one table again, if they are; transformers finds no adapted ones."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        model.tie_weights()
    elif model.config.get_text_config().tie_word_embeddings:
        plain = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
        plain[1].weight = plain[0].weight


def _inside(model: PreTrainedModel, work: Callable[[PreTrainedModel], T]) -> T:
    return work(model)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _rebuild_buffers(model: PreTrainedModel) -> None:
    """Write what checkpoints do not hold, such as the frequencies of rotary embeddings."""
    owners = [part for part in model.modules() if any(True for _ in part.buffers(recurse=False))]
    for owner in owners:
        for buffer in owner.buffers(recurse=False):
            buffer.fill_(torch.nan)
        fill_anew(model, owner)
    for name, buffer in model.named_buffers():
        if not bool(buffer.isfinite().all()):
            raise ConfigurationError(
                f"model.policy: {type(model).__name__} keeps a table ({name}) that cannot be made "
                "anew: it cannot be sharded, use DDP"
            )
