"""Weights as safetensors files."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scsdpo.rollout.weights.weights import StreamHash

_SHARD_BYTES = 2**31
"""Size from which the next tensor goes into another file; twice of it is held in memory."""


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> tuple[list[Path], str]:
    """Write (name, value) pairs into files in a new `folder`.

    While one file is written, the tensors of the next are gathered and copied to the host.

    Args:
        weights: is iterated to its end.
        folder: must not exist yet.

    Returns:
        The files, and the `StreamHash` of what they hold.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True)
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    stream = StreamHash()
    written: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:

        def flush() -> None:
            nonlocal shard, written
            if written is not None:
                written.result()
            files.append(folder / f"{len(files):05d}.safetensors")
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            written = writer.submit(save_file, shard, files[-1])
            shard = {}

        for name, value in weights:
            stream.add(name, value)
            shard[name] = _on_host(value.detach())
            if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
                flush()
        if shard:
            flush()
        if written is not None:
            written.result()
    return files, stream.hexdigest()


def _on_host(value: Tensor) -> Tensor:
    """A copy in memory of the host; from a GPU it is under way when this returns."""
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=True)
