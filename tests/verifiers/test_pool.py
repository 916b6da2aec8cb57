"""The pool: a verifier that hangs, raises, exits, leaks or lies costs its own rollout only."""

import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from coins import Coin, Unprepared, Unruly
from precision import within
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.prompt import Prompt, Verdict
from scsdpo.verifiers import MultipleChoice, Verification, Verifier, VerifierPool, verify_all
from scsdpo.verifiers import pool as pool_module

# Where there is no /proc, nothing says which processes are there.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

QUICK = Verification(workers=2, deadline=1.0, memory_mb=512)


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(QUICK)
    yield pool
    pool.close()


def prompt(answer="A", verifier=MultipleChoice()):
    return Prompt(key="k", messages=(), verifier=verifier, answer=answer)


def judged(pool, responses, verifier=Unruly()):
    return pool.verify([prompt(verifier=verifier)], [responses])[0]


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def groups():
    """Process groups of all processes but zombies."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            stats.append(path.read_text().rpartition(")")[2].split())
    return {int(fields[2]) for fields in stats if fields[0] != "Z"}


def cpu_seconds():
    """Of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def wait_until(condition, seconds=10.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_verdicts_are_those_of_this_process_in_the_order_of_the_rollouts(pool):
    prompts = [prompt(letter) for letter in "ABC"] + [prompt(verifier=Coin())]
    texts = [[f"<answer>{letter}</answer>" for letter in "ABCA\ud800"] for _ in prompts]
    texts[1], texts[3] = [], ["é", "\x00", ""]
    assert pool.verify(prompts, texts) == verify_all(prompts, texts)
    assert pool.verify([], []) == ()


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("raise", "Unruly: KeyError('oops')"),
        ("exit", "Unruly: SystemExit(3)"),
        ("die", "Unruly: its process died (exit code 3)"),
        ("allocate", "Unruly: MemoryError()"),
        ("none", "Unruly returned None"),
        ("nan", "Unruly returned Verdict(reward=nan"),
        ("text", "Unruly returned Verdict(reward='1'"),
        ("answer", "Unruly returned Verdict(reward=1.0, answer=7"),
    ],
)
def test_a_broken_verifier_costs_its_own_rollout_only(pool, response, error):
    verdicts = judged(pool, ["fine", *["so"] * 20, response, *["so"] * 20])
    failed = [verdict for verdict in verdicts if verdict.error]
    assert [verdict.reward for verdict in failed] == [0.0]
    assert failed[0].error.startswith(error)
    assert [verdict.answer for verdict in verdicts] == ["fine", *["so"] * 20, None, *["so"] * 20]


@pytest.mark.parametrize("how", ["hang", "spin", "fork"])
def test_a_hanging_verifier_delays_the_batch_by_its_deadline_and_no_more(pool, how):
    judged(pool, ["so"] * 512)  # it is known by now how fast it is
    begin, used = time.monotonic(), cpu_seconds()
    verdicts = judged(pool, [*["so"] * 300, how, *["so"] * 211])
    # One that computes has its deadline of processor time, however many others want some.
    took = cpu_seconds() - used if how == "spin" else time.monotonic() - begin
    assert [v.error for v in verdicts if v.error] == ["Unruly: no verdict within 1 s"]
    assert sum(v.reward for v in verdicts) == 511 / 2
    assert took < QUICK.deadline + 0.5


def test_every_rollout_may_hang_and_the_pool_recovers(pool):
    begin = time.monotonic()
    assert all(v.error for v in judged(pool, ["hang"] * 4))
    assert time.monotonic() - begin < 3.5  # two at a time
    assert not any(v.error for v in judged(pool, ["so"] * 4))


def test_what_a_killed_verifier_started_dies_with_it(pool):
    (verdict,) = judged(pool, ["so"])
    assert alive(int(verdict.feedback))
    before = {worker.process.pid for worker in pool.workers}
    judged(pool, ["fork"])
    (dead,) = before - {worker.process.pid for worker in pool.workers}
    assert os.getpgid(0) in groups()
    assert dead not in groups()


def test_a_process_that_leaks_is_replaced_and_no_verdict_lost():
    pool = VerifierPool(Verification(workers=1, deadline=5.0, memory_mb=512))
    verdicts = judged(pool, ["so", "leak 300"]) + judged(pool, ["so"] * 9)
    assert [v.error for v in verdicts] == [""] * 11
    assert len({v.feedback for v in verdicts}) == 2
    pool.close()


def test_a_verifier_may_print_what_it_likes(pool):
    assert [v.answer for v in judged(pool, ["print", "print"])] == ["print", "print"]


def test_slow_verifiers_share_the_processes_evenly(pool):
    within(1.3, lambda: [judged(pool, ["sleep 0.2"] * 4) for _ in range(2)])


def test_a_process_killed_between_batches_is_replaced(pool):
    judged(pool, ["so"])
    for worker in pool.workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    assert not any(v.error for v in judged(pool, ["so"] * 10))


def test_closing_leaves_no_process_and_the_next_batch_starts_new_ones():
    pool = VerifierPool(QUICK)
    (first,) = judged(pool, ["so"])
    pool.close()
    assert not alive(int(first.feedback))
    (second,) = judged(pool, ["so"])
    pids = [worker.process.pid for worker in pool.workers]
    del pool
    assert second.reward == 0.5
    assert not any(map(alive, pids))


def test_an_interrupted_batch_leaves_nothing_behind():
    pool = VerifierPool(Verification(workers=2, deadline=60.0))
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        judged(pool, ["hang"] * 8)
    assert pool.workers == ()
    assert [v.answer for v in judged(pool, ["a", "b"])] == ["a", "b"]
    pool.close()


OWNER = """
import sys
from coins import Unruly
from scsdpo.prompt import Prompt
from scsdpo.verifiers import Verification, VerifierPool
if __name__ == "__main__":
    pool = VerifierPool(Verification(workers=2, deadline=1.5))
    prompt = Prompt(key="k", messages=(), verifier=Unruly(), answer="")
    pool.verify([prompt], [["so"] * 8])
    print(*[worker.process.pid for worker in pool.workers], flush=True)
    pool.verify([prompt], [[sys.argv[1]] * 8])
"""


@pytest.mark.parametrize("what", ["so", "hang", "spin"])
def test_the_processes_end_with_an_owner_that_is_killed(tmp_path, what):
    (tmp_path / "owner.py").write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    command = [sys.executable, str(tmp_path / "owner.py"), what]
    owner = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.3)  # at work
    owner.kill()
    owner.communicate()
    wait_until(lambda: not any(map(alive, pids)), seconds=5.0)


def test_a_verifier_of_the_program_itself_judges_in_this_process(pool, caplog):
    @dataclass(frozen=True)
    class Local(Verifier):
        def verify(self, prompt, response):
            return Verdict(reward=1.0, feedback=str(os.getpid()))

    with caplog.at_level(logging.WARNING):
        verdicts = pool.verify([prompt(verifier=Local()), prompt()], [["x", "y"], ["z"]])
    assert [v.feedback for v in verdicts[0]] == [str(os.getpid())] * 2
    assert verdicts[1][0].reward == 0
    assert caplog.messages == [
        "Local judges in the training process, without a deadline: define its class in a "
        "module of its own, so that it can be sent to another process"
    ]


def test_without_workers_this_process_judges():
    pool = VerifierPool(Verification(workers=0))
    (verdict,) = judged(pool, ["so"])
    assert verdict.feedback == str(os.getpid())
    assert pool.workers == ()


def test_a_verifier_that_cannot_work_at_all_ends_the_run():
    for workers in (0, 1):
        pool = VerifierPool(Verification(workers=workers))
        with pytest.raises(ConfigurationError, match=r"Unprepared cannot work: .*install it"):
            judged(pool, ["x"], Unprepared())
        assert pool.workers == ()


def test_processes_that_do_not_start_end_the_run(monkeypatch):
    from scsdpo.verifiers import process

    monkeypatch.setattr(process, "_BOOT", "import sys; sys.exit(5)")
    with pytest.raises(TrainingStopped, match=r"do not start .*exit code 5.*workers=0"):
        judged(VerifierPool(QUICK), ["x"])
    monkeypatch.setattr(process, "_BOOT", "import time; time.sleep(99)")
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.2)
    with pytest.raises(TrainingStopped, match=r"do not start \(no verdict within 0.2 s\)"):
        judged(VerifierPool(QUICK), ["x"])


def test_a_pool_can_be_copied_without_its_processes(pool):
    judged(pool, ["so"])
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.settings == pool.settings
    assert copy.workers == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", -1), ("deadline", 0), ("deadline", float("inf")), ("memory_mb", 8)],
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`Verification\({name}=...\)` must be .*, got"):
        Verification(**{name: value})


def test_512_rollouts_of_multiple_choice_take_less_than_a_fifth_of_a_second(pool):
    prompts = [prompt()] * 64
    texts = [["reasoning " * 800 + "<answer>A</answer>"] * 8] * 64
    pool.verify(prompts, texts)
    verdicts = within(0.2, lambda: pool.verify(prompts, texts))
    assert sum(v.reward for group in verdicts for v in group) == 512


def test_a_worker_does_not_import_torch():
    code = "import sys, scsdpo.verifiers.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
