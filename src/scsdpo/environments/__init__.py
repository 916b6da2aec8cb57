"""Environments of several turns: tools, and environments written for other libraries."""

from scsdpo.environments.bfcl import BFCLEpisode
from scsdpo.environments.skyrl import SkyRLEnvironment
from scsdpo.environments.tau2 import Tau2Episode
from scsdpo.environments.tools import Tools
from scsdpo.environments.trl import TRLEnvironment
from scsdpo.prompt import Environment, Observation, Verdict

__all__ = [
    "BFCLEpisode",
    "Environment",
    "Observation",
    "SkyRLEnvironment",
    "TRLEnvironment",
    "Tau2Episode",
    "Tools",
    "Verdict",
]
