"""Print a line on checkpoints."""

from lightning.pytorch.utilities import rank_zero_only

from scsdpo.io.files import tell

say = rank_zero_only(tell)
"""Print one line on standard error, on rank 0 only."""
