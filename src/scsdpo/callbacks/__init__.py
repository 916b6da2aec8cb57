"""Callbacks: what a run shows and writes."""

from scsdpo.callbacks.before_after import BeforeAfter, before_after_table
from scsdpo.callbacks.prediction_writer import PredictionWriter

__all__ = ["BeforeAfter", "PredictionWriter", "before_after_table"]
