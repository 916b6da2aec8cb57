"""What a run says of its checkpoints."""

import sys

from lightning.pytorch.utilities import rank_zero_only

from scsdpo.io.text import in_one_line


@rank_zero_only
def say(text: str) -> None:
    """One line on standard error, once for all ranks."""
    print(f"scsdpo: {in_one_line(text)}", file=sys.stderr, flush=True)
