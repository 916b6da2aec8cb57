"""Two processes give the numbers of one, whatever each of them has to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "two_ranks.py"


def train(folder, world, out, method):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), str(folder), str(world), str(out), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=False)


def remembered(state):
    """Of a pool the questions in it; of anything else all."""
    return [group[1]["keys"] for group in state["groups"]] if "groups" in state else state


@pytest.mark.parametrize("method", ["sc-sdpo", "grpo", "memory"])
def test_two_processes_train_as_one(qwen3, tmp_path, method):
    one, steps, logged = train(qwen3, 1, tmp_path / "one.pt", method)
    two, steps_two, logged_two = train(qwen3, 2, tmp_path / "two.pt", method)
    assert steps == steps_two > 3
    for name, value in one.items():
        if name.endswith("_extra_state"):
            assert remembered(two[name]) == remembered(value), name
            continue
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name in ("train/loss", "train/pass_rate", "train/gradient_norm", "val/mean@2", "val/maj@2"):
        assert logged_two[name] == pytest.approx(logged[name], rel=1e-3, abs=1e-5), name
