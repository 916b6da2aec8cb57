"""Writing that a disk may refuse without ending the run."""

from collections.abc import Callable
from typing import Any

import torch

from scsdpo.distributed import all_max
from scsdpo.records import Outage


def disk_outage() -> Outage:
    """Of a run's checkpoints; torch's writer raises a RuntimeError where a disk is full."""
    return Outage("saving a checkpoint", (OSError, RuntimeError))


def everywhere(outage: Outage, write: Callable[[], Any], *, part: bool = False) -> bool:
    """Whether no rank's disk refused to `write`; all come here, and none waits for one that failed.

    A full disk or a folder that is gone is said once and tried again with the next checkpoint.
    `part`: more is to be done before there is a checkpoint.
    """
    return not bool(all_max(torch.tensor(float(not outage.attempt(write, part=part)))))
