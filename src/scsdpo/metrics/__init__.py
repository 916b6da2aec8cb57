"""Metrics: torchmetrics modules for validation, and the training log."""

from scsdpo.metrics.gap import GapCheck
from scsdpo.metrics.groups import ByCategory, MajAtK, MeanAtK
from scsdpo.metrics.phases import PhaseTimer
from scsdpo.metrics.training import (
    log_figures,
    phase_metrics,
    rollout_metrics,
    token_metrics,
)

__all__ = [
    "ByCategory",
    "GapCheck",
    "MajAtK",
    "MeanAtK",
    "PhaseTimer",
    "log_figures",
    "phase_metrics",
    "rollout_metrics",
    "token_metrics",
]
