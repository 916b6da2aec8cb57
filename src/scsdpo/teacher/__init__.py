"""Teacher: what would the model say, had it known more?"""

from scsdpo.teacher._base import NoTeacher, Teacher
from scsdpo.teacher.context import (
    Context,
    DemonstrationOrFeedback,
    Feedback,
    GoldSolution,
    PlainPrompt,
    SiblingDemonstration,
)
from scsdpo.teacher.memory import RememberedDemonstration
from scsdpo.teacher.teachers import EMA, Frozen, Live, Restart, TrustRegion
from scsdpo.teacher.templates import Templates

__all__ = [
    "EMA",
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
    "SiblingDemonstration",
    "Teacher",
    "Templates",
    "TrustRegion",
]
