"""Deadlines run in own time: what is stopped, or gets no processor, does not use them up."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from scsdpo.verifiers import own_time
from scsdpo.verifiers.own_time import LOOK_SECONDS, OwnTime

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SPIN = "while True: pass"


@pytest.fixture
def started():
    """Starts Python programs, and ends them."""
    processes = []

    def start(code, count=1, processor=None):
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", code]))
            if processor is not None:
                os.sched_setaffinity(processes[-1].pid, {processor})
        return [process.pid for process in processes[-count:]]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def used(pids, wall):
    """Seconds of own time that pass in so many of the wall's."""
    clock = OwnTime(pids, 60.0)
    end = time.monotonic() + wall
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS / 2)
        assert not clock.over()
    return 60.0 - clock.left


def test_one_that_sleeps_uses_its_time():
    assert used([os.getpid()], 0.6) == pytest.approx(0.6, abs=0.15)


def test_a_process_that_is_stopped_uses_none(started):
    (pid,) = started("import time; time.sleep(60)")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.05)
    assert used([pid], 0.6) < 0.1
    os.kill(pid, signal.SIGCONT)


def test_processes_that_share_a_processor_with_many_use_their_share(started):
    processor = min(os.sched_getaffinity(0))
    started(SPIN, count=5, processor=processor)
    (pid,) = started(SPIN, processor=processor)
    used([pid], 0.3)  # until all have started
    assert used([pid], 1.0) < 0.6  # a sixth, give or take


def test_those_that_a_process_has_started_count_with_it(started):
    (pid,) = started("import subprocess; subprocess.run(['sleep', '60'])")
    limit = time.monotonic() + 20
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(int(children[0]), signal.SIGSTOP)
    time.sleep(0.05)
    assert used([pid], 0.4) < 0.1
    os.kill(int(children[0]), signal.SIGKILL)


def test_a_gap_in_which_this_process_did_not_run_hardly_counts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(own_time.time, "monotonic", lambda: now[0])
    clock = OwnTime([os.getpid()], 1.0)
    now[0] += 3600.0
    assert not clock.over()
    assert 0.5 < clock.left < 1.0
    for _ in range(9):
        now[0] += LOOK_SECONDS
        clock.over()
    assert clock.over()


def test_one_that_stays_stopped_is_given_up_after_ten_deadlines(started, monkeypatch):
    (pid,) = started("import time; time.sleep(60)")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.05)
    begin = time.monotonic()
    clock = OwnTime([pid], 0.1)
    while not clock.over():
        time.sleep(0.02)
    assert 0.9 < time.monotonic() - begin < 2.0


FREEZER = """
import json, sys
from coins import Unruly
from scsdpo.prompt import Prompt
from scsdpo.verifiers import PythonTests, Verification, VerifierPool
if __name__ == "__main__":
    pool = VerifierPool(Verification(workers=2, deadline=2.5))
    slow = Prompt(key="k", messages=(), verifier=Unruly(), answer="")
    tests = Prompt(key="k", messages=(), verifier=PythonTests(seconds=1.5), answer='["assert x"]')
    code = "```python\\nimport time\\nwhile time.process_time() < .5: pass\\nx = 1\\n```"
    pool.verify([slow, tests], [["so"], [code]])
    print("ready", flush=True)
    verdicts = pool.verify([slow, tests], [["sleep 0.8"] * 3, [code] * 3])
    print(json.dumps([[v.reward, v.error] for group in verdicts for v in group]), flush=True)
    pool.close()
"""


def descendants(pid):
    found = [pid]
    with suppress(OSError):
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [d for child in listed.read_text().split() for d in descendants(int(child))]
    return found


def test_a_machine_that_is_frozen_in_the_middle_of_verdicts_makes_none_of_them_wrong(tmp_path):
    (tmp_path / "freezer.py").write_text(FREEZER)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(tmp_path / "freezer.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "ready\n"
        time.sleep(0.4)
        for stop, pause in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.0)):
            for pid in descendants(owner.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, stop)
            time.sleep(pause)
        assert (
            owner.stdout.readline()
            == str([[0.5, '""']] * 3 + [[1.0, '""']] * 3).replace("'", "") + "\n"
        )
