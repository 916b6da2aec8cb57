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
"""Intercepts every operation while it is active; documented, but without a public path."""
tree_leaves = _pytree.tree_leaves
"""Leaves of nested lists, tuples and dicts, in the order of torch's own dispatch."""

flash_forward = torch.ops.aten._flash_attention_forward
"""Flash attention on CUDA with its log-normaliser, which the public function does not return."""
flash_backward = torch.ops.aten._flash_attention_backward
"""Backward of `flash_forward`, given any output and log-normaliser; the public one takes none."""
cpu_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Flash attention on CPU with its log-normaliser, which the public function does not return."""
cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Backward of `cpu_flash_forward`, given any output and log-normaliser; the public one takes none.
"""

NAMES_IN_TABLES = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
}
"""Module -> private names that the pickled table of a sharded checkpoint contains."""


def default_store() -> dist.Store:
    """The key-value store of the process group, which no public function returns."""
    return dist.distributed_c10d._get_default_store()


def compiled_graphs() -> int:
    """Number of graphs that torch has compiled in this process; there is no public counter."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def storage_key(storage: torch.UntypedStorage) -> int:
    """A key that is equal for two handles of one storage; the public address is 0 for all empty
    ones.
    """
    return storage._cdata


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Keep DDP from broadcasting and reducing these parameters and buffers of `module`.

    DDP has no argument for it.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def load_hooks(module: nn.Module) -> Mapping[int, Callable[..., Any]]:
    """The hooks that run after `load_state_dict`; public functions add one but do not list them.

    A copied module has copies of them.
    """
    return module._load_state_dict_post_hooks


class Moved(nn.Module):
    """A module that handles `to`, `cuda`, `half` and the like itself.

    All of them call a private method, also on submodules; none calls a public one there.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.moves_alone(fn):
            return self
        return super()._apply(fn, recurse)

    @abstractmethod
    def moves_alone(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Apply `fn` to the tensors that move and return True; or return False, and torch applies
        it to all.
        """
