"""Episodes in the processes that judge: nothing that one does costs another anything."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import worlds
from scsdpo import interrupt
from scsdpo.prompt import Observation, Prompt, Verdict
from scsdpo.verifiers import Episodes, ExactMatch, Verification, VerifierPool
from scsdpo.verifiers import episodes as module


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(
        Verification(workers=2, turn_deadline=1.0, episode_deadline=20.0, memory_mb=512)
    )
    yield pool
    pool.close()


def prompt(environment, key="q"):
    messages = ({"role": "user", "content": "Hello."},)
    return Prompt(key=key, messages=messages, verifier=environment, answer="a")


def played(pool, prompts, says, n=1):
    """Verdict and observations of each row, which answers as `says` [rows][turn]."""
    seen, verdicts = [[] for _ in says], [None] * len(says)
    with Episodes(pool, prompts, n) as episodes:
        episodes.open()
        for row, texts in enumerate(says):
            episodes.submit(row, texts[0])
        turn = [0] * len(says)
        while None in verdicts:
            for row, answer in episodes.answers(wait=True):
                if isinstance(answer, Verdict):
                    verdicts[row] = answer
                    continue
                seen[row].append(answer.messages[0]["content"])
                turn[row] += 1
                episodes.submit(row, says[row][turn[row]])
        records = [episodes.record(row) for row in range(len(says))]
    assert [record.verdict for record in records] == verdicts
    return verdicts, seen, records


FINE = ["a", "b", "c"]


def is_fine(verdict, seen):
    return verdict == Verdict(reward=1.0, answer="c", feedback="It is over.") and seen == [
        "1 steps",
        "2 steps",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_episode_goes_turn_by_turn_to_its_verdict(pool, workers):
    use = pool if workers else VerifierPool(Verification(workers=0))
    verdicts, seen, records = played(use, [prompt(worlds.Counting())] * 2, [FINE] * 4, n=2)
    assert all(map(is_fine, verdicts, seen))
    assert [(p.role, p.text) for p in records[0].parts] == [
        ("assistant", "a"), ("user", "1 steps"), ("assistant", "b"), ("user", "2 steps"),
        ("assistant", "c"),
    ]  # fmt: skip
    assert records[0].turns == 3 and records[0].rewards == (0.5, 0.5, 0.0)
    assert records[0].feedback == "On turn 1: step 1\nOn turn 2: step 2\nIt is over."
    assert records[0].transcript(str.upper) == (
        "A\n\n[user]\n1 steps\n[/user]\n\nB\n\n[user]\n2 steps\n[/user]\n\nC"
    )


def test_environments_that_answer_at_once_are_all_heard_at_once(pool, monkeypatch):
    """Two processes have twenty responses, one each at a time; the caller asks once."""
    monkeypatch.setattr(module, "SOON", 5.0)
    for wait in (True, False):
        with Episodes(pool, [prompt(worlds.Counting(turns=1))] * 2, 10) as episodes:
            episodes.open()
            for row in range(20):
                episodes.submit(row, "a")
            assert sorted(row for row, _ in episodes.answers(wait=wait)) == list(range(20))


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("hang", "Bad: no answer within 1 s"),
        ("raise", "Bad: KeyError('no such thing')"),
        ("exit", "Bad: SystemExit(3)"),
        ("die", "Bad: its process died (SIGKILL)"),
        ("leak", "Bad: OSError(12, 'not enough memory')"),
    ],
)
def test_what_one_episode_does_costs_no_other(pool, deed, why, tmp_path):
    """Its neighbours are rebuilt, if need be, and see what they would have seen."""
    bad = worlds.Bad(folder=str(tmp_path))
    says = [["a", deed, "c"], *[FINE] * 4]
    verdicts, seen, _ = played(pool, [prompt(bad)], says, n=5)
    late = "time" if deed == "hang" else ""
    assert verdicts[0] == Verdict(reward=0.0, error=why, stopped=late) and seen[0] == ["1 steps"]
    assert all(map(is_fine, verdicts[1:], seen[1:]))


def test_an_episode_whose_process_was_killed_is_rebuilt_by_its_responses(pool, tmp_path):
    bad = worlds.Bad(folder=str(tmp_path))
    verdicts, seen, _ = played(pool, [prompt(bad)], [["a", "die once", "c"]])
    assert is_fine(verdicts[0], seen[0])
    steps = sorted(path.name.split("-")[1:] for path in tmp_path.glob("q-*"))
    first = {pid for step, pid in steps if step == "1"}
    assert len(first) == 2, "the first step was taken in both processes"


def test_an_episode_that_does_not_replay_says_so(pool, tmp_path):
    drifting = worlds.Drifting(folder=str(tmp_path))
    verdicts, _, _ = played(pool, [prompt(drifting)], [["a", "die once", "c"]])
    assert "other messages than before: set `replays = False`" in verdicts[0].error


def test_one_that_says_so_has_a_process_of_its_own(pool, tmp_path):
    own = worlds.Drifting(folder=str(tmp_path), replays=False)
    says = [["a", "b", "c"], ["a", "b", "c"], ["a", "die", "c"]]
    verdicts, seen, _ = played(pool, [prompt(own)], says, n=3)
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.0]
    assert "does not replay" in verdicts[2].error
    assert len({row[0] for row in seen}) == 3 and all(len(set(row)) == 1 for row in seen)
    pids = {int(row[0].split()[1]) for row in seen}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_more_episodes_of_their_own_than_processes_take_turns(pool, monkeypatch):
    monkeypatch.setattr(module, "MAX_OWN_PROCESSES", 2)
    own = worlds.Drifting(replays=False)
    verdicts, _, _ = played(pool, [prompt(own, key) for key in "abc"], [FINE] * 3)
    assert [verdict.reward for verdict in verdicts] == [1.0] * 3


def test_a_whole_episode_has_a_deadline_too(tmp_path):
    with_limit = VerifierPool(Verification(workers=1, turn_deadline=5.0, episode_deadline=0.3))
    says = [["a", "b", "c"]]
    verdicts, _, _ = played(with_limit, [prompt(worlds.Slow(), "slow")], says)
    with_limit.close()
    assert verdicts[0].error == "Slow: no end within 0.3 s of all its turns" or (
        "no answer within" in verdicts[0].error
    )
    assert verdicts[0].stopped == "time"


def test_what_an_episode_has_started_ends_with_it_and_not_before(pool, tmp_path):
    bad = worlds.Bad(folder=str(tmp_path))
    with Episodes(pool, [prompt(bad)], 1) as episodes:
        episodes.open()
        episodes.submit(0, "start")
        episodes.answers(wait=True)
        (child,) = (int(path.name.split("-")[1]) for path in tmp_path.glob("child-*"))
        episodes.submit(0, "b")
        episodes.answers(wait=True)
        assert Path(f"/proc/{child}").exists()
        episodes.submit(0, "c")
        ((_, verdict),) = episodes.answers(wait=True)
        assert verdict.reward == 1.0
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    "what",
    ["text", "role", "empty", "nan", "earned", "reward", "calls", "stopped"],
)
def test_nonsense_is_an_error_of_the_environment(pool, what):
    verdicts, _, _ = played(pool, [prompt(worlds.Returns())], [[what]])
    assert verdicts[0].reward == 0.0 and verdicts[0].error.startswith("Returns returned ")


def test_a_long_observation_is_cut_at_its_end_with_a_mark(pool):
    most = pool.settings.max_observation
    with Episodes(pool, [prompt(worlds.Returns())], 1) as episodes:
        episodes.open()
        episodes.submit(0, "long")
        ((_, answer),) = episodes.answers(wait=True)
        assert answer == Observation.said("x" * (most - 6) + " [cut]")
        episodes.submit(0, "", last="enough")
        ((_, verdict),) = episodes.answers(wait=True)
    assert verdict.feedback == "The episode has not come to its end: enough."


def test_an_opening_is_shown_and_is_the_same_for_a_group(pool):
    asked = [prompt(worlds.Opening(turns=1)), prompt(ExactMatch())]
    with Episodes(pool, asked, 2) as episodes:
        first, second = episodes.open()
        assert first[0]["content"] == "Hello. You see a door."
        assert second == asked[1].messages and not episodes.plays(2)
        for row in (0, 1):
            episodes.submit(row, "x")
        while episodes.answers(wait=True):
            pass
        assert [episodes.record(row).verdict.reward for row in (0, 1)] == [1.0, 1.0]
    verdicts, _, _ = played(pool, [prompt(worlds.Opening(random=True))], [FINE] * 3, n=3)
    assert sum("begins with other messages" in verdict.error for verdict in verdicts) == 2
    verdicts, _, _ = played(pool, [prompt(worlds.Opening(fails=True))], [FINE] * 2, n=2)
    assert {verdict.error for verdict in verdicts} == {"Opening: OSError('no door')"}


def test_a_forgotten_episode_begins_anew(pool):
    with Episodes(pool, [prompt(worlds.Counting())], 1) as episodes:
        episodes.open()
        for _ in range(2):
            episodes.submit(0, "a")
            ((_, answer),) = episodes.answers(wait=True)
            assert answer.messages[0]["content"] == "1 steps"
            episodes.submit(0, "b")  # nobody will hear the answer
            episodes.forget(0)
        for text in FINE:
            episodes.submit(0, text)
            ((_, answer),) = episodes.answers(wait=True)
        assert answer.reward == 1.0 and episodes.record(0).turns == 3


def test_a_run_that_is_asked_to_stop_does_not_wait_for_an_episode(tmp_path):
    """An environment that hangs has a minute; the signal comes after half a second."""
    pool = VerifierPool(Verification(workers=1, turn_deadline=60.0))
    interrupt.reset()
    interrupt.begin_run(None)
    try:
        with (
            pytest.raises(interrupt.Interrupted),
            Episodes(pool, [prompt(worlds.Bad(folder=str(tmp_path)))], 1) as episodes,
        ):
            episodes.open()
            interrupt.open_window()
            episodes.submit(0, "hang")
            threading.Timer(0.5, interrupt.ask, [signal.SIGTERM]).start()
            start = time.monotonic()
            episodes.answers(wait=True)
    finally:
        interrupt.reset()
    assert time.monotonic() - start < 20 and not pool.workers


def test_the_training_process_keeps_no_process_of_a_pool_that_was_left(tmp_path):
    pool = VerifierPool(Verification(workers=1))
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        Episodes(pool, [prompt(worlds.Counting())], 1) as episodes,
    ):
        episodes.open()
        pids = [worker.process.pid for worker in pool.workers]
        raise RuntimeError("interrupted")
    assert not pool.workers and pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
