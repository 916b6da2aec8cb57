"""Two ranks stop together, whichever was asked, and leave after the state is saved."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from stopping import (
    ARGUMENTS,
    HERE,
    SIGNALS,
    environment,
    last,
    marks,
    same_end,
    send,
    share,
    state,
)

PHASES = ["sampling", "verifying", "update", "validation", "saving"]
TARGETS = {"first": (0,), "second": (1,), "both": (0, 1)}
CASES = list(itertools.product(PHASES, SIGNALS, TARGETS))
random.Random(1).shuffle(CASES)
RUNNING: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left():
    """A test that fails leaves no rank behind: a launched one ends with the first."""
    yield
    while RUNNING:
        process = RUNNING.pop()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.wait(60)


def start(model, folder, *args):
    policy = f"--model.policy.name_or_path={model}"
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    folder.mkdir(exist_ok=True)
    with (folder / "err").open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, HERE / "command.py", "fit", policy, *ARGUMENTS, *ranks, *args],
            cwd=folder,
            env=environment(FAULTS_AT=str(folder)),
            stdout=said,
            stderr=said,
        )
    RUNNING.append(process)
    return process


def wait_for(process, folder, name, phase, times):
    limit = time.monotonic() + 240
    while marks(folder, name).count(phase) < times:
        assert process.poll() is None and time.monotonic() < limit, (folder / "err").read_text()
        time.sleep(0.005)


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def undisturbed(qwen3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(qwen3, folder).wait(300) == 0, (folder / "err").read_text()
    return folder


@pytest.mark.parametrize(("phase", "name", "target"), CASES[: share("RANKS", 2, 10)])
def test_two_ranks_stop_together(phase, name, target, qwen3, undisturbed, tmp_path):
    signum, code = SIGNALS[name]
    process = start(qwen3, tmp_path, "--checkpoint.every_minutes=0")
    for rank in TARGETS[target]:
        wait_for(process, tmp_path, f"marks.{rank}", phase, times=3)
    pids = [int((tmp_path / f"process.{rank}").read_text()) for rank in (0, 1)]
    asked = time.monotonic()
    for rank in TARGETS[target]:
        send(pids[rank], signum)
    assert process.wait(60) == code, (tmp_path / "err").read_text()
    assert time.monotonic() - asked < 30
    assert all(map(is_gone, pids))
    error = (tmp_path / "err").read_text()
    assert "Traceback" not in error
    batch = int(state(last(tmp_path))["state_dict"]["batches"])
    assert f"the state after batch {batch} is in" in error
    again = start(qwen3, tmp_path, "--ckpt_path=last")
    assert again.wait(300) == 0, (tmp_path / "err").read_text()
    same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("target", ["first", "second"])
def test_two_ranks_that_are_still_starting_end(target, qwen3, tmp_path):
    process = start(qwen3, tmp_path)
    wait_for(process, tmp_path, "marks.1", "start", times=1)
    pids = [int((tmp_path / f"process.{rank}").read_text()) for rank in (0, 1)]
    send(pids[TARGETS[target][0]], SIGNALS["TERM"][0])
    assert process.wait(60) == 143
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_mistake_that_both_ranks_find_is_printed_once(qwen3, tmp_path):
    """The category is looked up where the data are set up, which each rank does."""
    mistake = "--checkpoint.monitor=val/nonsense/mean@2"
    assert start(qwen3, tmp_path, mistake).wait(120) == 2
    said = (tmp_path / "err").read_text()
    assert said.count("scsdpo: error: ") == said.count("is of category 'nonsense'") == 1, said
