"""Advantage: what credit does each vocabulary entry get at each position?"""

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.advantage.blend import Blend, Weighted
from scsdpo.advantage.distillation import ReferenceAnchor, SelfDistillation
from scsdpo.advantage.divergence import centred_credit
from scsdpo.advantage.group_relative import (
    Baseline,
    BatchStd,
    GroupMean,
    GroupPassRate,
    GroupRelative,
    GroupStd,
    LeaveOneOut,
    RatioLevel,
    Scale,
    SequenceLevel,
    TokenLevel,
    Unscaled,
)
from scsdpo.advantage.support import Full, Sampled, Support, TopK

__all__ = [
    "Advantage",
    "Baseline",
    "BatchStd",
    "Blend",
    "Full",
    "GroupMean",
    "GroupPassRate",
    "GroupRelative",
    "GroupStd",
    "LeaveOneOut",
    "Plan",
    "RatioLevel",
    "ReferenceAnchor",
    "Sampled",
    "Scale",
    "SelfDistillation",
    "SequenceLevel",
    "Support",
    "TokenLevel",
    "TopK",
    "Unscaled",
    "Weighted",
    "centred_credit",
]
