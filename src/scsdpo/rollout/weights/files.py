"""Weights and adapters as safetensors files."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scsdpo.rollout.weights.hashing import StreamHash

_MEMORY = Path("/dev/shm")
_PEFT = "base_model.model."
"""The prefix of layers' names in peft's files."""

_SHARD_BYTES = 2**31
"""Bytes after which a file is complete; twice as much is held in memory."""


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> tuple[list[Path], str]:
    """Write (name, value) pairs into files in a new `folder`.

    While one file is written, the tensors of the next are gathered and copied to the host.

    Args:
        weights: the pairs.
        folder: must not exist yet.

    Returns:
        The files, and the `StreamHash` of the pairs.

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
    """A copy in memory of the host; a copy from a GPU is not complete when this returns."""
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=True)


def write_adapter(weights: dict[str, Tensor], folder: Path) -> tuple[list[Path], str]:
    """Write an adapter in peft's format, which vLLM loads, into a new `folder`.

    Args:
        weights: from `adapter_weights`. B includes the scale, hence alpha = r.
        folder: must not exist yet.

    Returns:
        The files, and their `adapter_hash`.
    """
    folder.mkdir(parents=True)
    rank = next(value.shape[0] for name, value in weights.items() if ".lora_A." in name)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.split(".")[-3] for name in weights}),
        "bias": "none",
    }
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    files[0].write_text(json.dumps(config))
    values = {f"{_PEFT}{name}": value.cpu().contiguous() for name, value in weights.items()}
    save_file(values, files[1])
    return files, adapter_hash(values)


def adapter_hash(weights: dict[str, Tensor]) -> str:
    """`StreamHash` of factors; names count from `layers.` on, because engines change prefixes."""
    stream = StreamHash()
    for name, value in weights.items():
        stream.add(name[name.find("layers.") :], value)
    return stream.hexdigest()


@contextmanager
def folder_in_memory(needed: int) -> Iterator[Path]:
    """A temporary folder for `needed` bytes, in memory if they fit, else on the disk."""
    parent = memory_or_disk(needed)
    with tempfile.TemporaryDirectory(prefix="scsdpo-adapter-", dir=parent) as folder:
        yield Path(folder)


def memory_or_disk(needed: int) -> Path:
    """Parent folder for `needed` bytes of temporary files: /dev/shm if they fit, else the disk."""
    in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * needed
    return _MEMORY if in_memory else Path(tempfile.gettempdir())
