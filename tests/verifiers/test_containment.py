"""Verifiers that fork, answer twice, leave processes behind or talk too much cost one rollout."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from scsdpo.prompt import Prompt
from scsdpo.verifiers import Verification, VerifierPool, verify_all
from scsdpo.verifiers.text import capped, capped_distinct
from scsdpo.verifiers.verify import MAX_ANSWER, MAX_ERROR
from strays import Served, Strays

# Where there is no /proc, nothing says which processes are there.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

QUICK = Verification(workers=2, deadline=1.0, memory_mb=512)
AROUND = ["so"] * 20


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(QUICK)
    yield pool
    pool.close()


def judged(pool, responses, verifier=Strays(), answer=""):
    prompt = Prompt(key="k", messages=(), verifier=verifier, answer=answer)
    return pool.verify([prompt], [responses])[0]


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def judged_between(pool, response, **options):
    """The verdict on one response of many, the others of which are judged as ever."""
    verdicts = judged(pool, [*AROUND, response, *AROUND], **options)
    others = [*verdicts[:20], *verdicts[21:]]
    assert [(verdict.reward, verdict.answer, verdict.error) for verdict in others] == [
        (0.5, "so", "")
    ] * 40
    return verdicts[20]


@pytest.mark.parametrize("how", ["fork-return", "fork-raise", "fork-exit", "twice"])
def test_a_copy_or_a_second_answer_does_not_count(pool, how):
    verdict = judged_between(pool, how)
    assert (verdict.reward, verdict.answer, verdict.error) == (0.5, how, "")
    assert not [pid for pid in alive_with_parent(int(verdict.feedback)) if alive(pid)]


def alive_with_parent(parent):
    tasks = Path(f"/proc/{parent}/task")
    files = tasks.glob("*/children") if tasks.exists() else ()
    return [int(pid) for file in files for pid in file.read_text().split()]


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("endless", "Strays: it writes without end to the pipe of its verdicts"),
        ("closes", "Strays: its process died (exit code 1)"),
        ("killpg", "Strays: its process died (SIGKILL)"),
        ("cancel", "Strays: CancelledError()"),
        ("unshowable", "Strays: a Unshowable that cannot be shown"),
        ("daemon die", "Strays: its process died (exit code 3)"),
        ("daemon hang", "Strays: no verdict within 1 s"),
    ],
)
def test_what_breaks_a_process_costs_one_rollout(pool, tmp_path, how, error):
    verdict = judged_between(pool, how, answer=str(tmp_path / "pid"))
    assert (verdict.reward, verdict.error) == (0.0, error)
    if "daemon" in how:
        assert not alive((tmp_path / "pid").read_text())


@pytest.mark.parametrize("how", ["session", "daemon"])
def test_what_a_verdict_leaves_behind_ends_with_it(pool, tmp_path, how):
    verdict = judged_between(pool, how, answer=str(tmp_path / "pid"))
    assert int(verdict.answer) > 1
    assert not alive(verdict.answer)


OWNER = """
import sys
from scsdpo.prompt import Prompt
from scsdpo.verifiers import Verification, VerifierPool
from strays import Strays
if __name__ == "__main__":
    pool = VerifierPool(Verification(workers=1, deadline=1.0))
    prompt = Prompt(key="k", messages=(), verifier=Strays(), answer=sys.argv[1])
    pool.verify([prompt], [["daemon hang"]])
"""


def test_what_a_verifier_started_ends_with_an_owner_that_is_killed(tmp_path):
    (tmp_path / "owner.py").write_text(OWNER)
    pid = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "owner.py"), str(pid)]
    with subprocess.Popen(command, env=environment) as owner:
        wait_until(lambda: pid.exists() and pid.read_text(), seconds=20.0)
        assert alive(pid.read_text())
        owner.kill()
    wait_until(lambda: not alive(pid.read_text()), seconds=5.0)


def wait_until(condition, seconds):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_without_a_guard_a_daemon_lives_on():
    code = "import strays; print(strays.daemon(), flush=True)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.wait()
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)


def test_what_a_verifier_starts_while_it_prepares_stays_until_the_pool_closes():
    pool = VerifierPool(Verification(workers=1, deadline=5.0))
    verdicts = [*judged(pool, ["a", "b"], Served()), *judged(pool, ["c"], Served())]
    assert {verdict.reward for verdict in verdicts} == {1.0}
    (helper,) = {verdict.answer for verdict in verdicts}
    assert alive(helper)
    pool.close()
    assert not alive(helper)


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_are_valid_and_capped_wherever_they_are_judged(workers):
    pool = VerifierPool(Verification(workers=workers, max_feedback=200))
    responses = ["so", "surrogate", "long 20 a", "long 20 b", "error 3", "so"]
    verdicts = judged(pool, responses)
    pool.close()
    first, surrogate, long, other, error, last = verdicts
    assert (first.answer, last.answer) == ("so", "so")
    assert (surrogate.answer, surrogate.feedback) == ("\ufffd", "a\ufffdb \U0001f600")
    assert long.feedback == "x" * 194 + " [cut]"
    assert len(long.answer) == len(other.answer) == MAX_ANSWER
    assert long.answer.startswith("xxx")
    assert long.answer != other.answer  # they do not vote together
    assert error.error == "\ufffd" * (MAX_ERROR - 6) + " [cut]"
    for verdict in verdicts:
        for text in (verdict.answer or "", verdict.feedback, verdict.error):
            text.encode()


def test_a_forked_copy_of_this_process_does_not_return_either():
    home = os.getpid()
    prompt = Prompt(key="k", messages=(), verifier=Strays(), answer="")
    ((verdict,),) = verify_all([prompt], [["fork-return"]])
    assert os.getpid() == home
    assert verdict.reward == 0.5
    os.wait()


def test_feedback_has_4000_characters_unless_told_otherwise(pool):
    assert Verification().max_feedback == 4000
    (verdict,) = judged(pool, ["long 1 a"])
    assert len(verdict.feedback) == 4000


def test_a_text_that_fits_is_kept():
    for cap in (capped, capped_distinct):
        assert cap("é" * 100, 100) == "é" * 100
        assert len(cap("é" * 101, 100)) == 100


def test_a_batch_of_long_feedback_takes_no_longer_than_one_of_short(pool):
    judged(pool, ["so"] * 8)
    begin = time.monotonic()
    verdicts = judged(pool, ["long 20 a"] * 8)
    assert time.monotonic() - begin < 5
    assert not any(verdict.error for verdict in verdicts)


# --- machines that have room for few processes ----------------------------------------------------

CROWD = """
import json, sys
from scsdpo.prompt import Prompt
from scsdpo.verifiers import PythonTests, Verification, VerifierPool
BOMB = '''
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: time.sleep(0.01)
'''
GOOD = '''
import threading
def f(n):
    threads = [threading.Thread(target=int) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return n + 1
'''
if __name__ == "__main__":
    pool = VerifierPool(Verification(workers=6, deadline=20.0))
    tests = json.dumps(["assert f(1) == 2"])
    prompt = Prompt(key="k", messages=(), verifier=PythonTests(seconds=1.0), answer=tests)
    texts = [f"```python{code}```" for code in [GOOD, GOOD, BOMB, GOOD, GOOD, GOOD, BOMB] * 2]
    (verdicts,) = pool.verify([prompt], [texts])
    pool.close()
    print(json.dumps([[v.reward, v.feedback, v.error] for v in verdicts]))
"""


@pytest.fixture
def few_processes():
    """Limits the processes and threads of a program and all it starts; where one may."""
    for root in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        group = root / f"scsdpo-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            break
    else:
        pytest.skip("no cgroup may be made here")
    try:
        if not (group / "pids.max").exists():
            pytest.skip("no pids cgroup may be made here")

        def limited(most):
            (group / "pids.max").write_text(str(most))
            return lambda: (group / "cgroup.procs").write_text(str(os.getpid()))

        yield limited
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), seconds=10.0)
        group.rmdir()


def test_siblings_of_those_that_start_threads_without_end_are_judged(few_processes, tmp_path):
    """Six workers need about 40 processes and threads, and each that starts threads takes 64."""
    (tmp_path / "crowd.py").write_text(CROWD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "crowd.py")],
        env=environment,
        preexec_fn=few_processes(42),
        stdout=subprocess.PIPE,
        check=True,
    )
    verdicts = json.loads(ran.stdout)
    bombs = verdicts[2::7] + verdicts[6::7]
    good = [verdict for number, verdict in enumerate(verdicts) if number % 7 not in (2, 6)]
    assert [reward for reward, _, _ in bombs] == [0.0] * 4
    assert len(good) == 10
    assert [verdict for verdict in good if verdict != [1.0, "", ""]] == []
