"""Callbacks that show a run's progress and write its files."""

from scsdpo.callbacks.before_after import BeforeAfter, before_after_table
from scsdpo.callbacks.prediction_writer import PredictionWriter
from scsdpo.callbacks.progress import Progress
from scsdpo.callbacks.report import Report
from scsdpo.callbacks.rollouts import RolloutCallback, show_batch, show_rollouts
from scsdpo.callbacks.run_records import RunRecords

__all__ = [
    "BeforeAfter",
    "PredictionWriter",
    "Progress",
    "Report",
    "RolloutCallback",
    "RunRecords",
    "before_after_table",
    "show_batch",
    "show_rollouts",
]
