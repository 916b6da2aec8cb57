"""A rank that is lost is named, and nobody waits for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scsdpo
from scsdpo.training.rank_watch import GRACE, broke_off

SCRIPT = Path(__file__).parent / "hurt_ranks.py"


def lost(model, fault, root, **more):
    """Exit code of the first rank, what both said, and when one of them died."""
    paths = [str(Path(__file__).parents[1] / "helpers"), str(Path(scsdpo.__file__).parents[1])]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}
    command = [sys.executable, str(SCRIPT), str(model), fault, str(root)]
    with (root / "stderr").open("w") as out:
        code = subprocess.run(
            command, stderr=out, env={**os.environ, **environment}, timeout=400
        ).returncode
    return code, (root / "stderr").read_text(), (root / "checkpoints" / "died").stat().st_mtime


@pytest.mark.parametrize("wait", ["", "1"], ids=["in a collective", "asleep"])
def test_the_first_rank_names_a_second_that_was_killed(qwen3, tmp_path, wait):
    code, said, died = lost(qwen3, "lost-1", tmp_path, WAIT=wait)
    assert time.time() - died < 60
    assert code == 3, said[-3000:]
    line = said.strip().splitlines()[-1]
    assert line.startswith("scsdpo: error: rank 1 was lost: its process or machine is gone; ")
    kept = "last.ckpt" if not wait else "epoch=0-step="
    assert f"the newest complete checkpoint is {tmp_path / 'checkpoints' / kept}" in line
    assert wait or "scsdpo: the state after batch 2 is in" in said


def test_a_second_rank_names_a_first_that_was_killed(qwen3, tmp_path):
    code, _, died = lost(qwen3, "lost-0", tmp_path)
    assert code == -9  # the first rank is the process that was started
    deadline = died + 60
    while "scsdpo: error" not in (tmp_path / "stderr").read_text() and time.time() < deadline:
        time.sleep(0.2)
    lines = (tmp_path / "stderr").read_text().strip().splitlines()
    assert lines[-1].startswith("scsdpo: error: rank 0 was lost: its process or machine is gone; ")
    assert f"the newest complete checkpoint is {tmp_path / 'checkpoints'}" in lines[-1]


def test_a_rank_that_stops_alone_is_quoted_by_the_others(qwen3, tmp_path):
    code, said, died = lost(qwen3, "stops-1", tmp_path)
    assert code == 3 and time.time() - died < 60
    ends = [line for line in said.splitlines() if line.startswith("scsdpo: error")]
    assert any(line == "scsdpo: error: it has had enough" for line in ends), said[-3000:]
    assert any("rank 1 failed: it has had enough; the newest complete" in line for line in ends)


def test_errors_of_collectives_are_told_from_others():
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer"
    assert broke_off(RuntimeError(gloo))
    assert not broke_off(RuntimeError("shapes cannot be multiplied"))
    assert not broke_off(KeyError("Connection"))
    assert GRACE < 60
