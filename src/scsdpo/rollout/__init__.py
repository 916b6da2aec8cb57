"""Rollout engines: they draw the responses that the policy learns from."""

from scsdpo.rollout._base import Drawing, Drawn, Rollout
from scsdpo.rollout.hf.rollout import HFRollout
from scsdpo.rollout.servers.delivery import Delivery, Download, SharedFolder
from scsdpo.rollout.servers.engine import Servers
from scsdpo.rollout.servers.nccl import Nccl
from scsdpo.rollout.servers.require_key import RequireKey
from scsdpo.rollout.vllm.colocated import Colocated
from scsdpo.rollout.vllm.rollout import Engine, VLLMRollout
from scsdpo.rollout.weights.receiver import WeightReceiver

__all__ = [
    "Colocated",
    "Delivery",
    "Download",
    "Drawing",
    "Drawn",
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
