"""vLLM in the trainer's process: contexts that undo what it changes there."""

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
    """Call the engine without Lightning's autocast and inference mode; undo its side effects.

    vLLM seeds every random generator. On CPU it replaces `torch.set_num_threads` by a function that
    does nothing.
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
    """Set what vLLM's external launcher reads when an engine starts; a collective.

    `LOCAL_RANK` is the index of the trainer's device: with `trainer.devices: [2, 3]` rank 0 has 2.
    On CPU the number of the tensor-parallel group names shared memory. It is drawn at random, so
    that it does not clash with that of another run or of a killed one.
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
    """Initialise torch.distributed with one rank unless it is; return True if this did it."""
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True


@contextmanager
def group_spared() -> Iterator[None]:
    """Let vLLM's shutdown destroy its own process groups only, and not the trainer's."""
    from vllm.distributed import parallel_state

    before = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = drop_world
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = before


@contextmanager
def class_kept(decoder: type, enforce_eager: bool) -> Iterator[None]:
    """Restore the policy's class after vLLM has started.

    vLLM runs an architecture that it does not implement (OLMo-3 in 0.32) from transformers' class,
    and changes this class in place for its compiler. Existing objects, such as the policy, can then
    no longer be called. Without compilation vLLM works with the unchanged class too.

    Raises:
        ConfigurationError: if vLLM changed the class and `enforce_eager` is false.
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
            f"model.rollout.engine.enforce_eager: vLLM would compile {decoder.__name__}, the "
            "policy's own class, in place: set it to true, or use the engine Servers"
        )
