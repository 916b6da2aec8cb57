"""Planning: estimates of a configuration's memory and time, from the model's `config.json` only."""

from scsdpo.planning.advice import Advice, advice, fits
from scsdpo.planning.architecture import Architecture, Counted, read_model_config, skeleton
from scsdpo.planning.callback import MemoryPlan
from scsdpo.planning.memory import Memory, Parts, memory_of
from scsdpo.planning.setup import Devices, Lengths, Setup, setup_of, sharding
from scsdpo.planning.speed import Rates, Work, work_of
from scsdpo.planning.splitting import DeviceSplit, splits

__all__ = [
    "Advice",
    "Architecture",
    "Counted",
    "DeviceSplit",
    "Devices",
    "Lengths",
    "Memory",
    "MemoryPlan",
    "Parts",
    "Rates",
    "Setup",
    "Work",
    "advice",
    "fits",
    "memory_of",
    "read_model_config",
    "setup_of",
    "sharding",
    "skeleton",
    "splits",
    "work_of",
]
