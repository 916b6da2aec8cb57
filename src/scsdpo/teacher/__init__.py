"""Teacher: what would the model say, had it known more?"""

from scsdpo.teacher._base import NoTeacher, Teacher
from scsdpo.teacher.context import (
    Context,
    DemonstrationOrFeedback,
    Feedback,
    PlainPrompt,
    SiblingDemonstration,
)
from scsdpo.teacher.teachers import EMA, Frozen, Live, TrustRegion
from scsdpo.teacher.templates import Templates

__all__ = [
    "EMA",
    "Context",
    "DemonstrationOrFeedback",
    "Feedback",
    "Frozen",
    "Live",
    "NoTeacher",
    "PlainPrompt",
    "SiblingDemonstration",
    "Teacher",
    "Templates",
    "TrustRegion",
]
