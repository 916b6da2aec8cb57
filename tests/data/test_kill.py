"""A training that is killed ten times asks what one that is not asks."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from streams import lines

SCRIPT = Path(__file__).parents[1] / "helpers" / "kill_runs.py"


def histories(model, kills):
    """What was asked at each step, in the order in which steps were begun, for each folder."""
    for folder in kills:
        folder.mkdir()
        lines(folder / "lines", range(12))
    arguments = [model, 0, *(part for pair in kills.items() for part in pair)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
        for folder in kills
    ]


def test_killed_ten_times_a_run_asks_each_question_as_often_as_a_clean_one(qwen3, tmp_path):
    clean, killed = histories(qwen3, {tmp_path / "clean": 0, tmp_path / "killed": 10})
    assert [step for step, _ in clean] == list(range(26))
    asked = {step: tuple(keys) for step, keys in clean}
    # A step that was lost is begun again, with the questions that it had.
    assert all(asked[step] == tuple(keys) for step, keys in killed)
    assert {step for step, _ in killed} == set(asked)
    assert len(killed) > len(clean)
    # Every question once a pass: 15 are at hand at once, 12 come as a stream.
    counts = Counter(key for keys in asked.values() for key in keys)
    assert len(counts) == 27
    assert set(counts.values()) <= {3, 4}
