"""Teacher: what would the model say, had it known more?"""

from scsdpo.teacher._base import NoTeacher, Teacher
from scsdpo.teacher.context import (
    Context,
    DemonstrationOrFeedback,
    Feedback,
    GoldSolution,
    PlainPrompt,
    ShortestSuccess,
    SiblingDemonstration,
)
from scsdpo.teacher.memory import AttemptMemory, RememberedDemonstration
from scsdpo.teacher.teachers import EMA, Frozen, Live, Restart, TrustRegion
from scsdpo.teacher.templates import Templates

__all__ = [
    "EMA",
    "AttemptMemory",
    "Context",
    "DemonstrationOrFeedback",
    "Feedback",
    "Frozen",
    "GoldSolution",
    "Live",
    "NoTeacher",
    "PlainPrompt",
    "RememberedDemonstration",
    "Restart",
    "ShortestSuccess",
    "SiblingDemonstration",
    "Teacher",
    "Templates",
    "TrustRegion",
]
