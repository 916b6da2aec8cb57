"""A short run of the shipped policy with all its records, for whoever reads them.

python tests/helpers/record_run.py FOLDER [config or override ...]
"""

import sys
from pathlib import Path

from scsdpo.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "trainer.limit_train_batches=20",
    "trainer.val_check_interval=5",
    "data.val.size=32",
    "data.questions_per_batch=8",
    "model.val_sampling.n=4",
    "records.questions=4",
    "records.trace_every=5",
)


def record_run(folder: Path, *given: str) -> None:
    """A run in `folder/run/version_0`; `given` are further words of the command line."""
    words = ["fit", "--config", f"{ROOT}/configs/tiny.yaml", *(f"--{word}" for word in SHORT)]
    words += [f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run"]
    sys.argv = ["scsdpo", *words, *given]
    if failure := main():
        raise SystemExit(failure)


if __name__ == "__main__":
    record_run(Path(sys.argv[1]), *sys.argv[2:])
