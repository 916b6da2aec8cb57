"""Metrics: torchmetrics modules for validation, and the training log."""

from scsdpo.metrics.gap import GapCheck
from scsdpo.metrics.groups import ByCategory, MajAtK, MeanAtK
from scsdpo.metrics.training import rollout_metrics, token_metrics

__all__ = ["ByCategory", "GapCheck", "MajAtK", "MeanAtK", "rollout_metrics", "token_metrics"]
