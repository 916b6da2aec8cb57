"""The embedded default: procedural tasks and a tiny policy that ships with the package."""

from pathlib import Path

from scsdpo.lab.question import LEVELS, Question
from scsdpo.lab.science import Science
from scsdpo.lab.tasks import LabTasks
from scsdpo.lab.toolcall import ToolRequest

TINY = Path(__file__).parent / "weights"
"""The folder of the tiny policy: weights, tokenizer, record of its making."""


def tiny_path() -> str:
    """What a policy called `tiny` is loaded from."""
    return str(TINY)


__all__ = ["LEVELS", "TINY", "LabTasks", "Question", "Science", "ToolRequest", "tiny_path"]
