"""Records: what a run leaves behind beside its checkpoints."""

from scsdpo.records.folder import run_folder
from scsdpo.records.jsonl import JsonLines
from scsdpo.records.metrics_file import MetricsFile
from scsdpo.records.outage import Outage
from scsdpo.records.recorded import Recorded

__all__ = ["JsonLines", "MetricsFile", "Outage", "Recorded", "run_folder"]
