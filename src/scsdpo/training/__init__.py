"""Training: the module that composes the strategies, and the optimizer step."""

from scsdpo.advantage import Batch
from scsdpo.training.ahead import Ahead
from scsdpo.training.evaluation import FOLDER
from scsdpo.training.module import PolicyOptimizer
from scsdpo.training.step import Limits, OptimizerSteps, Update
from scsdpo.training.teacher_gain import TeacherCheck
from scsdpo.training.trace import BatchTrace
from scsdpo.training.warmup import Examples, GoldAnswers, Successes, Warmup

__all__ = [
    "FOLDER",
    "Ahead",
    "Batch",
    "BatchTrace",
    "Examples",
    "GoldAnswers",
    "Limits",
    "OptimizerSteps",
    "PolicyOptimizer",
    "Successes",
    "TeacherCheck",
    "Update",
    "Warmup",
]
