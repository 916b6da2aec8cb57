"""Data: sources of questions, and the loaders that bring them to the training loop."""

from scsdpo.data._base import Source, Stream
from scsdpo.data.bfcl import BFCL
from scsdpo.data.module import TaskDataModule
from scsdpo.data.prompts import PromptList, make_prompt
from scsdpo.data.reasoning_gym import ReasoningGym
from scsdpo.data.records import Math, Records, ToolUse
from scsdpo.data.sciknoweval import SciKnowEval
from scsdpo.data.shuffled import PromptBatch
from scsdpo.data.tau2 import Tau2

__all__ = [
    "BFCL",
    "Math",
    "PromptBatch",
    "PromptList",
    "ReasoningGym",
    "Records",
    "SciKnowEval",
    "Source",
    "Stream",
    "TaskDataModule",
    "Tau2",
    "ToolUse",
    "make_prompt",
]
