"""The report: one page that shows a run's folder."""

from scsdpo.report.figures import panels
from scsdpo.report.page import render, write
from scsdpo.report.reading import Run, read_runs

__all__ = ["Run", "panels", "read_runs", "render", "write"]
