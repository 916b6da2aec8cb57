"""Health: what in a run's figures says that it goes wrong, and what to do."""

from scsdpo.health._base import Finding, Rule, Series
from scsdpo.health.callback import Health
from scsdpo.health.rules import (
    Agreement,
    EntropyCollapse,
    EntropyRise,
    HeldOutFalls,
    ImportanceCapped,
    LengthCollapse,
    Mastered,
    NoSuccess,
    SamplerDrift,
    Truncation,
    shipped_rules,
)

__all__ = [
    "Agreement",
    "EntropyCollapse",
    "EntropyRise",
    "Finding",
    "Health",
    "HeldOutFalls",
    "ImportanceCapped",
    "LengthCollapse",
    "Mastered",
    "NoSuccess",
    "Rule",
    "SamplerDrift",
    "Series",
    "Truncation",
    "shipped_rules",
]
