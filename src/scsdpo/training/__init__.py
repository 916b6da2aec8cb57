"""Training: the module that composes the strategies, and the optimizer step."""

from scsdpo.advantage import Batch
from scsdpo.training.ahead import Ahead
from scsdpo.training.evaluation import FOLDER
from scsdpo.training.module import PolicyOptimizer
from scsdpo.training.step import Limits, OptimizerSteps, Update
from scsdpo.training.trace import BatchTrace

__all__ = [
    "FOLDER",
    "Ahead",
    "Batch",
    "BatchTrace",
    "Limits",
    "OptimizerSteps",
    "PolicyOptimizer",
    "Update",
]
