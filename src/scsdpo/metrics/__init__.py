"""Metrics: what the log shows of a training step and of an evaluation."""

from scsdpo.metrics.gap import GapCheck
from scsdpo.metrics.groups import MajAtK, MeanAtK
from scsdpo.metrics.phases import PhaseTimer
from scsdpo.metrics.training import (
    SHOWN_TURNS,
    age_metrics,
    episode_metrics,
    log_figures,
    phase_metrics,
    rollout_metrics,
    token_metrics,
)

__all__ = [
    "SHOWN_TURNS",
    "GapCheck",
    "MajAtK",
    "MeanAtK",
    "PhaseTimer",
    "age_metrics",
    "episode_metrics",
    "log_figures",
    "phase_metrics",
    "rollout_metrics",
    "token_metrics",
]
