"""vLLM in a process that is not its own: what it changes there is undone."""

import os
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from scsdpo.distributed import all_gather
from scsdpo.errors import ConfigurationError
from scsdpo.private.vllm import drop_world, number_group


@contextmanager
def contained(device: torch.device) -> Iterator[None]:
    """Work with the engine: no autocast and no inference mode of Lightning's reaches it.

    It seeds every generator and, on CPU, replaces `torch.set_num_threads` with a function that does
    nothing: undone at the end.
    """
    before = random.getstate(), np.random.get_state(), torch.set_num_threads
    cuda = [device] if device.type == "cuda" else []
    plain = torch.autocast(device.type, enabled=False)
    with torch.random.fork_rng(devices=cuda), plain, torch.inference_mode(False), torch.no_grad():
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_num_threads = before[2]


@contextmanager
def launched(device: torch.device) -> Iterator[None]:
    """Set what vLLM's external launcher reads when an engine starts; every rank comes here.

    `LOCAL_RANK` is the trainer's own device: with `trainer.devices: [2, 3]` rank 0 is on 2. The
    number of its tensor-parallel group names shared memory on CPU, where that of another run, or of
    one that was killed, would be in the way.
    """
    number_group("tp", all_gather([secrets.randbits(31)])[0])
    place = {"RANK": dist.get_rank(), "LOCAL_RANK": device.index or 0}
    before = {name: os.environ.get(name) for name in place}
    os.environ |= {name: str(number) for name, number in place.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make_world(device: torch.device) -> bool:
    """Initialise torch.distributed with a world of one, where there is none; whether it did."""
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True


@contextmanager
def group_spared() -> Iterator[None]:
    """Let vLLM's shutdown drop its own groups, and leave the trainer's, which it would destroy."""
    from vllm.distributed import parallel_state

    before = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = drop_world
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = before


@contextmanager
def class_kept(decoder: type, enforce_eager: bool) -> Iterator[None]:
    """Give the policy's class back as it was.

    An architecture that vLLM has no code of its own for (OLMo-3 in 0.32) runs from transformers'
    class, which vLLM changes in place for its compiler: objects made before, such as the policy,
    can then not be called any more. Without compilation the unchanged class does as well.
    """
    bases, own = decoder.__bases__, dict(vars(decoder))
    try:
        yield
    finally:
        changed = decoder.__bases__ != bases
        if changed:
            decoder.__bases__ = bases
            for name in ("__init__", "__call__"):
                if name in own:
                    setattr(decoder, name, own[name])
                elif name in vars(decoder):
                    delattr(decoder, name)
    if changed and not enforce_eager:
        raise ConfigurationError(
            f"model.rollout.engine.enforce_eager: vLLM compiles {decoder.__name__} in place, the "
            "policy's own class: set it to true, or use the engine Servers"
        )
