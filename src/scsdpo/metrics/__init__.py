"""Metrics: figures of training steps and evaluations, as they are logged."""

from scsdpo.metrics.gap import GapCheck
from scsdpo.metrics.groups import MajAtK, MeanAtK
from scsdpo.metrics.phases import MODEL_PHASES, PHASES, PhaseTimer
from scsdpo.metrics.training import (
    SHOWN_TURNS,
    TokenOrigin,
    age_metrics,
    episode_metrics,
    log_figures,
    peak_memory,
    phase_metrics,
    rollout_metrics,
    token_metrics,
)

__all__ = [
    "MODEL_PHASES",
    "PHASES",
    "SHOWN_TURNS",
    "GapCheck",
    "MajAtK",
    "MeanAtK",
    "PhaseTimer",
    "TokenOrigin",
    "age_metrics",
    "episode_metrics",
    "log_figures",
    "peak_memory",
    "phase_metrics",
    "rollout_metrics",
    "token_metrics",
]
