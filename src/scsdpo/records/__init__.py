"""Records: the files that a run writes beside its checkpoints."""

from scsdpo.records.batch_files import BatchFiles
from scsdpo.records.environment import environment
from scsdpo.records.folder import begin_path, run_folder, runs_folder
from scsdpo.records.jsonl import JsonLines
from scsdpo.records.lock import hold, release
from scsdpo.records.metrics_file import MetricsFile
from scsdpo.records.outage import Outage, guard_logger
from scsdpo.records.recorder import Recorded, Recorder, recorded
from scsdpo.records.schema import (
    SCHEMA_VERSION,
    HealthRecord,
    JsonNumber,
    Place,
    RolloutRecord,
    TokenRecord,
)
from scsdpo.records.text_log import TextLog
from scsdpo.records.token_trace import TokenTrace

__all__ = [
    "SCHEMA_VERSION",
    "BatchFiles",
    "HealthRecord",
    "JsonLines",
    "JsonNumber",
    "MetricsFile",
    "Outage",
    "Place",
    "Recorded",
    "Recorder",
    "RolloutRecord",
    "TextLog",
    "TokenRecord",
    "TokenTrace",
    "begin_path",
    "environment",
    "guard_logger",
    "hold",
    "recorded",
    "release",
    "run_folder",
    "runs_folder",
]
