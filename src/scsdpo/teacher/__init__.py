"""Teachers: distributions that know more than the student, by their context or their weights."""

from scsdpo.teacher._base import NoTeacher, Teacher, contexts_of
from scsdpo.teacher.context import (
    Context,
    Contexts,
    DemonstrationOrFeedback,
    FailedSibling,
    Feedback,
    GoldSolution,
    PlainPrompt,
    PrivilegedInfo,
    Reprompt,
    ShortestSuccess,
    SiblingDemonstration,
    SiblingOfSeveral,
    SolutionAlone,
)
from scsdpo.teacher.memory import AttemptMemory, RememberedDemonstration
from scsdpo.teacher.teachers import EMA, External, Frozen, Live, Restart, TrustRegion
from scsdpo.teacher.templates import Templates

__all__ = [
    "EMA",
    "AttemptMemory",
    "Context",
    "Contexts",
    "DemonstrationOrFeedback",
    "External",
    "FailedSibling",
    "Feedback",
    "Frozen",
    "GoldSolution",
    "Live",
    "NoTeacher",
    "PlainPrompt",
    "PrivilegedInfo",
    "RememberedDemonstration",
    "Reprompt",
    "Restart",
    "ShortestSuccess",
    "SiblingDemonstration",
    "SiblingOfSeveral",
    "SolutionAlone",
    "Teacher",
    "Templates",
    "TrustRegion",
    "contexts_of",
]
