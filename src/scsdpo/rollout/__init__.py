"""Rollout: which responses do we learn from?"""

from scsdpo.rollout._base import Rollout
from scsdpo.rollout.colocated import Colocated
from scsdpo.rollout.delivery import Delivery, Download, SharedFolder
from scsdpo.rollout.hf import HFRollout
from scsdpo.rollout.nccl import Nccl
from scsdpo.rollout.require_key import RequireKey
from scsdpo.rollout.servers import Servers
from scsdpo.rollout.vllm_rollout import Engine, VLLMRollout
from scsdpo.rollout.weight_receiver import WeightReceiver

__all__ = [
    "Colocated",
    "Delivery",
    "Download",
    "Engine",
    "HFRollout",
    "Nccl",
    "RequireKey",
    "Rollout",
    "Servers",
    "SharedFolder",
    "VLLMRollout",
    "WeightReceiver",
]
