"""Private names of torch."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _python_dispatch, _pytree

CHECKED = ">=2.13,<2.14"

DispatchMode = _python_dispatch.TorchDispatchMode
"""Sees every operation while it is active; torch documents it and has no public path to it."""
tree_leaves = _pytree.tree_leaves
"""The leaves of nested lists, tuples and dicts, as torch's own dispatch walks them."""

flash_forward = torch.ops.aten._flash_attention_forward
"""Flash attention on CUDA with its log-normaliser, which the public function does not return."""
flash_backward = torch.ops.aten._flash_attention_backward
"""Its backward, given any output and log-normaliser; the public one takes its own only."""
cpu_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Flash attention on CPU with its log-normaliser, which the public function does not return."""
cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Its backward, given any output and log-normaliser; the public one takes its own only."""

NAMES_IN_TABLES = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
}
"""By module, what the pickled table of a sharded checkpoint names beside public classes."""


def default_store() -> dist.Store:
    """The key-value store of the process group, which no public function returns."""
    return dist.distributed_c10d._get_default_store()


def compiled_graphs() -> int:
    """How many graphs torch has compiled in this process; public counters do not exist."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def storage_key(storage: torch.UntypedStorage) -> int:
    """Equal for two handles of one storage, also an empty one, whose public address is 0."""
    return storage._cdata


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Have DDP neither broadcast nor reduce these parameters and buffers of `module`.

    DDP's arguments cannot name them.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def load_hooks(module: nn.Module) -> Mapping[int, Callable[..., Any]]:
    """The hooks that run after `load_state_dict`; a public function adds one and none lists them.

    A copied module has copies of them.
    """
    return module._load_state_dict_post_hooks


class Moved(nn.Module):
    """A module that decides what `to`, `cuda`, `half` and the like do with it.

    All of them go through a private method, and no public one is called by a parent module.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.moves_alone(fn):
            return self
        return super()._apply(fn, recurse)

    @abstractmethod
    def moves_alone(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether it has itself applied `fn` to what moves; False: torch does, to everything."""
