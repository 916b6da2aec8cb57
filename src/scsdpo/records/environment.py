"""Versions and hardware of a run."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import lightning as L
import torch

PACKAGES = ("scsdpo", "torch", "lightning", "transformers", "peft", "vllm")


def environment(trainer: L.Trainer) -> dict[str, str]:
    """Versions, machine and devices as text; packages that are not installed are omitted."""
    root = trainer.strategy.root_device
    if root.type == "cuda":
        device = torch.cuda.get_device_name(root)
    else:
        device = f"{root.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    machine = {
        "device": device,
        "ranks": str(trainer.world_size),
        "precision": str(trainer.precision),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    return machine | {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
