"""A run that is killed at any moment goes on to the undisturbed run's end, bit for bit."""

import random
import signal
import time

import pytest
from stopping import last, marks, same_end, send, share, wait_for

KILLS = share("KILLS", 5, 20)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_end(number, commands, undisturbed, tmp_path):
    """Killed once or twice; saving slowed in every second one, TMPDIR elsewhere in every second
    pair.
    """
    rng = random.Random(number)
    elsewhere = {"TMPDIR": "/dev/shm" if number // 2 % 2 else str(tmp_path)}
    job = {"slow": bool(number % 2), "environment": elsewhere}
    every = "--checkpoint.every_minutes=0"
    for _ in range(rng.choice([1, 2])):
        begun = len(marks(tmp_path))
        process = commands.begin(tmp_path, every, *resume(tmp_path), **job)
        phase = rng.choice(["sampling", "verifying", "update", "saving", "saving", "saving"])
        wait_for(tmp_path, phase, times=rng.choice([1, 2]), begun=begun)
        time.sleep(rng.uniform(0, 0.15))
        send(process, signal.SIGKILL)
        assert commands.end() == -signal.SIGKILL
    assert commands.run(tmp_path, every, *resume(tmp_path), **job) == 0, (
        tmp_path / "err"
    ).read_text()
    same_end(tmp_path, undisturbed)
    newest = last(tmp_path).parent
    assert {path.name for path in newest.iterdir()} == {"last.ckpt", "previous.ckpt"}


def resume(folder):
    """From the newest, if anything was saved yet."""
    return ["--ckpt_path=last"] if list(folder.rglob("last.ckpt")) else []
