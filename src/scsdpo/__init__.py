"""scsdpo: self-distillation policy optimization of language models.

The names below are those that a first script needs. Each is imported when it is first used, so that
`import scsdpo` and `scsdpo --help` do not import torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scsdpo.advantage import Blend as Blend
    from scsdpo.advantage import GroupRelative as GroupRelative
    from scsdpo.advantage import Routed as Routed
    from scsdpo.advantage import SelfDistillation as SelfDistillation
    from scsdpo.cli.load import load as load
    from scsdpo.data import Records as Records
    from scsdpo.data import TaskDataModule as TaskDataModule
    from scsdpo.policy import CausalLM as CausalLM
    from scsdpo.policy import Lora as Lora
    from scsdpo.rollout import HFRollout as HFRollout
    from scsdpo.rollout import VLLMRollout as VLLMRollout
    from scsdpo.teacher import EMA as EMA
    from scsdpo.teacher import External as External
    from scsdpo.teacher import Frozen as Frozen
    from scsdpo.training import PolicyOptimizer as PolicyOptimizer
    from scsdpo.types import Sampling as Sampling
    from scsdpo.weighting import PassRate as PassRate
    from scsdpo.weighting import Uniform as Uniform

# peft imports bitsandbytes where that is installed, and on some CPUs it logs an error about a
# missing kernel, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

HOMES = {
    "advantage": ("Blend", "GroupRelative", "Routed", "SelfDistillation"),
    "cli.load": ("load",),
    "data": ("Records", "TaskDataModule"),
    "policy": ("CausalLM", "Lora"),
    "rollout": ("HFRollout", "VLLMRollout"),
    "teacher": ("EMA", "External", "Frozen"),
    "training": ("PolicyOptimizer",),
    "types": ("Sampling",),
    "weighting": ("PassRate", "Uniform"),
}
"""Package -> its names that are available at the top level."""

__all__ = [
    "EMA",
    "Blend",
    "CausalLM",
    "External",
    "Frozen",
    "GroupRelative",
    "HFRollout",
    "Lora",
    "PassRate",
    "PolicyOptimizer",
    "Records",
    "Routed",
    "Sampling",
    "SelfDistillation",
    "TaskDataModule",
    "Uniform",
    "VLLMRollout",
    "load",
]


if not TYPE_CHECKING:  # for type checkers it would make every misspelled name valid

    def __getattr__(name: str) -> object:
        home = next((home for home, names in HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module 'scsdpo' has no attribute {name!r}")
        return getattr(importlib.import_module(f"scsdpo.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
