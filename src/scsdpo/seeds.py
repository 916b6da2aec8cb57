"""The run's one seed."""

import os
from typing import Literal

Seed = int | Literal["auto"]
"""A seed of one's own; `auto`: the run's."""


def run_seed() -> int:
    """What `seed_everything` set, by YAML, command line or `lightning.seed_everything`; else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def resolved(seed: Seed) -> int:
    """`seed`, or the run's seed as it is now."""
    return run_seed() if seed == "auto" else seed
