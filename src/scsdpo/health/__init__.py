"""Health: rules that warn when a run's figures show that it goes wrong."""

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
