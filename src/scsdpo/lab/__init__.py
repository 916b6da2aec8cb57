"""Procedural tasks that need no files: the questions of the default runs, and arithmetic."""

from scsdpo.lab.arithmetic import Arithmetic
from scsdpo.lab.question import LEVELS, Question
from scsdpo.lab.science import Science
from scsdpo.lab.store import StoreTasks
from scsdpo.lab.tasks import LabTasks
from scsdpo.lab.toolcall import ToolRequest

__all__ = ["LEVELS", "Arithmetic", "LabTasks", "Question", "Science", "StoreTasks", "ToolRequest"]
