"""Checkpoints: when they are written, how, and what they contain."""

from scsdpo.checkpoints.callback import LAST, PREVIOUS, Checkpoint
from scsdpo.checkpoints.choosing import newest, newest_whole, usable_neighbour
from scsdpo.checkpoints.comparing import Change, Consequence, changes
from scsdpo.checkpoints.fitting import fit_weights
from scsdpo.checkpoints.fully_sharded import FullySharded
from scsdpo.checkpoints.reading import Saved, checkpoint_in
from scsdpo.checkpoints.resuming import take_back, write_whole_files
from scsdpo.checkpoints.safe_point import SafePoint, count_batches, under_way
from scsdpo.checkpoints.saying import say
from scsdpo.checkpoints.writing import WholeFiles, install, part_of, remove_parts

__all__ = [
    "LAST",
    "PREVIOUS",
    "Change",
    "Checkpoint",
    "Consequence",
    "FullySharded",
    "SafePoint",
    "Saved",
    "WholeFiles",
    "changes",
    "checkpoint_in",
    "count_batches",
    "fit_weights",
    "install",
    "newest",
    "newest_whole",
    "part_of",
    "remove_parts",
    "say",
    "take_back",
    "under_way",
    "usable_neighbour",
    "write_whole_files",
]
