"""vLLM's NCCL engines on CPUs: gloo in the place of NCCL, and nothing in that of streams.

Imported by the trainer's process and, as the workers' extension class, by theirs.
"""

import threading
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import nccl_common, packed_tensor

from scsdpo.rollout import WeightReceiver

HOUR = timedelta(hours=1)
LEFT = []
"""Groups that were left: gloo waits in its destructor for what is under way."""


class GlooGroup:
    """What vLLM asks of a `PyNcclCommunicator`; as NCCL, it waits for ever for who is gone."""

    device = torch.device("cpu")

    def __init__(self, host, port, rank, world_size, device):
        store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=HOUR)
        self.group = dist.ProcessGroupGloo(store, rank, world_size, HOUR)
        self.store = store
        self.gone = threading.Event()

    def broadcast(self, tensor, src, stream=None):
        options = dist.BroadcastOptions()
        options.rootRank = src
        work = self.group.broadcast([tensor], options)
        while not work.is_completed():
            if self.gone.wait(0.005):
                raise ConnectionAbortedError("the group was left")
        work.wait()

    def destroy(self):
        self.gone.set()
        LEFT.append(self)


STREAM = SimpleNamespace(synchronize=lambda: None)

nccl_common.stateless_init_process_group = GlooGroup
packed_tensor._get_streams = lambda device, count: (STREAM,) * count
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.synchronize = lambda *_: None
torch.cuda.stream = lambda _: nullcontext()


class GlooReceiver(WeightReceiver):
    """The extension class that brings these along."""
