"""The report: what a run's folder holds, as one page to look at."""

from scsdpo.report.figures import panels
from scsdpo.report.page import render, write
from scsdpo.report.reading import Run, read_runs

__all__ = ["Run", "panels", "read_runs", "render", "write"]
