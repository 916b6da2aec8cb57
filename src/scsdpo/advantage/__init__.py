"""Advantages: the credit of each vocabulary entry at each position."""

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.advantage._composed import Composed
from scsdpo.advantage.anchor import K1, K2, K3, EntropyBonus, Estimator, ReferenceKL
from scsdpo.advantage.batch import Batch
from scsdpo.advantage.blend import Blend, Weighted
from scsdpo.advantage.distillation import ReferenceAnchor, SelfDistillation
from scsdpo.advantage.divergence import (
    Divergence,
    FDivergence,
    SquaredFisherRao,
    SquaredHellinger,
)
from scsdpo.advantage.gated import GatedGap
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
    TurnRelative,
    Unscaled,
)
from scsdpo.advantage.modulator import (
    Modulator,
    Rhythm,
    SiblingContrast,
    SignAgreement,
    Surprise,
    TeacherInfluence,
    TeacherRatio,
    Unmodulated,
)
from scsdpo.advantage.routed import Route, Routed
from scsdpo.advantage.router import (
    AllOf,
    Every,
    Failed,
    GroupFailed,
    HasTeacher,
    Never,
    RateWithin,
    Router,
    Succeeded,
    Warmup,
)
from scsdpo.advantage.support import Full, Sampled, Support, TopK
from scsdpo.advantage.target import (
    AsTaught,
    DivergenceMix,
    LogitMix,
    PriorAtForks,
    Purified,
    Target,
)
from scsdpo.advantage.trusted import Trusted

__all__ = [
    "K1",
    "K2",
    "K3",
    "Advantage",
    "AllOf",
    "AsTaught",
    "Baseline",
    "Batch",
    "BatchStd",
    "Blend",
    "Composed",
    "Divergence",
    "DivergenceMix",
    "EntropyBonus",
    "Estimator",
    "Every",
    "FDivergence",
    "Failed",
    "Full",
    "GatedGap",
    "GroupFailed",
    "GroupMean",
    "GroupPassRate",
    "GroupRelative",
    "GroupStd",
    "HasTeacher",
    "LeaveOneOut",
    "LogitMix",
    "Modulator",
    "Never",
    "Plan",
    "PriorAtForks",
    "Purified",
    "RateWithin",
    "RatioLevel",
    "ReferenceAnchor",
    "ReferenceKL",
    "Rhythm",
    "Route",
    "Routed",
    "Router",
    "Sampled",
    "Scale",
    "SelfDistillation",
    "SequenceLevel",
    "SiblingContrast",
    "SignAgreement",
    "SquaredFisherRao",
    "SquaredHellinger",
    "Succeeded",
    "Support",
    "Surprise",
    "Target",
    "TeacherInfluence",
    "TeacherRatio",
    "TokenLevel",
    "TopK",
    "Trusted",
    "TurnRelative",
    "Unmodulated",
    "Unscaled",
    "Warmup",
    "Weighted",
]
