"""Training: the module that composes the strategies, and the optimizer step."""

from scsdpo.advantage import Batch
from scsdpo.training.evaluation_files import FOLDER
from scsdpo.training.limits import Limits
from scsdpo.training.module import PolicyOptimizer
from scsdpo.training.optimizer_steps import OptimizerSteps
from scsdpo.training.trace import BatchTrace
from scsdpo.training.update import Update

__all__ = ["FOLDER", "Batch", "BatchTrace", "Limits", "OptimizerSteps", "PolicyOptimizer", "Update"]
