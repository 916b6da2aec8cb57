"""Data: where questions come from, and how they reach the training loop."""

from scsdpo.data._base import Source
from scsdpo.data.loader import PromptBatch
from scsdpo.data.module import TaskDataModule
from scsdpo.data.prompts import PromptList, make_prompt
from scsdpo.data.records import Records, ToolUse
from scsdpo.data.sciknoweval import SciKnowEval

__all__ = [
    "PromptBatch",
    "PromptList",
    "Records",
    "SciKnowEval",
    "Source",
    "TaskDataModule",
    "ToolUse",
    "make_prompt",
]
