"""Checkpoints: when they are written, how, and what they hold."""

from scsdpo.checkpoints.callback import LAST, PREVIOUS, Checkpoint
from scsdpo.checkpoints.reading import Saved
from scsdpo.checkpoints.resumable import Resumable
from scsdpo.checkpoints.safe_point import SafePoint, under_way
from scsdpo.checkpoints.writing import WholeFiles, install, part_of, remove_parts

__all__ = [
    "LAST",
    "PREVIOUS",
    "Checkpoint",
    "Resumable",
    "SafePoint",
    "Saved",
    "WholeFiles",
    "install",
    "part_of",
    "remove_parts",
    "under_way",
]
