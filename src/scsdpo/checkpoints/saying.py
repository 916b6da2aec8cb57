"""What a run says of its checkpoints."""

import sys

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(text: str) -> None:
    """One line on standard error, once for all ranks."""
    print(f"scsdpo: {' '.join(text.split())}", file=sys.stderr, flush=True)
