"""The Trainer's strategy that shards weights over the ranks (FSDP2)."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scsdpo.checkpoints import shards
from scsdpo.policy.sharding import own_rows
from scsdpo.private.lightning import shard_over


class FullySharded(ModelParallelStrategy):
    """Weights, gradients and optimizer states in shards over all ranks (FSDP2).

    Checkpoints are folders in which each rank writes its own shards. Any number of ranks can resume
    from them, also one process with whole weights. From a checkpoint that is a file, each rank
    reads its own rows.

    Args:
        background: write `last.ckpt` during training. It needs host memory for a copy of a rank's
            shards and optimizer states; a write is finished before the next begins.
        process_group_backend: `gloo`, `nccl`, ...; null: the device's default.
        timeout: limit on the time of a collective.
    """

    def __init__(
        self,
        background: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, True, process_group_backend, timeout)
        self.background = background
        self._writers: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        shard_over(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the model is sharded once it is configured, so a checkpoint can be read before."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning loads the optimizer states that `load_checkpoint` returns."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return inner.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Path | str, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        shards.write(checkpoint, path, first=self.is_global_zero)

    def begin_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> shards.Background:
        """Do the same as `save_checkpoint`, in the background."""
        if self._writers is None:
            self._writers = dist.new_group(backend="gloo")
        return shards.Background(checkpoint, path, self._writers)

    def load_checkpoint(
        self, checkpoint_path: Path | str, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        module = self.lightning_module
        weights = module.state_dict()
        learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
        trains = module.trainer.state.fn == "fit"
        if shards.is_folder(path):
            return shards.read(path, weights=weights, parameters=learned, optimizer=trains)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not trains:
            content.pop("optimizer_states", None)
        return _spread(content, weights, learned)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)


def _spread(
    content: dict[str, Any], weights: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> dict[str, Any]:
    """A file's content, with each tensor cut to this rank's rows of it."""
    state = content["state_dict"]
    for name, value in state.items():
        state[name] = _rows(value, weights.get(name))
    for optimizer in content.get("optimizer_states", ()):
        for index, states in optimizer["state"].items():
            for kind, value in states.items():
                states[kind] = _rows(value, parameters[index])
    return content


def _rows(value: Any, like: Tensor | None) -> Any:
    if not (isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    mine = value[own_rows(like)].to(like.device, copy=True)  # no view of the mapped file
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    return DTensor.from_local(
        mine, mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
