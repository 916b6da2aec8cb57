"""Rollout: which responses do we learn from?"""

from scsdpo.rollout._base import Rollout
from scsdpo.rollout.hf import HFRollout

__all__ = ["HFRollout", "Rollout"]
