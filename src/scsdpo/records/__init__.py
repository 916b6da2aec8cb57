"""Records: what a run leaves behind beside its checkpoints."""

from scsdpo.records.folder import run_folder
from scsdpo.records.jsonl import JsonLines
from scsdpo.records.metrics_file import MetricsFile
from scsdpo.records.outage import Outage
from scsdpo.records.recorded import Recorded
from scsdpo.records.schema import (
    SCHEMA_VERSION,
    HealthRecord,
    Number,
    Place,
    RolloutRecord,
    TokenRecord,
)

__all__ = [
    "SCHEMA_VERSION",
    "HealthRecord",
    "JsonLines",
    "MetricsFile",
    "Number",
    "Outage",
    "Place",
    "Recorded",
    "RolloutRecord",
    "TokenRecord",
    "run_folder",
]
