"""A run that is asked to stop saves what is whole, says so, and goes on where it was."""

import itertools
import random

import pytest
from stopping import SIGNALS, last, marks, same_end, send, share, state, wait_for

PHASES = ["sampling", "verifying", "update", "validation", "saving"]
CASES = list(itertools.product(["start", *PHASES], SIGNALS))
random.Random(0).shuffle(CASES)


@pytest.mark.parametrize(("phase", "name"), CASES[: share("SIGNALS", 4, len(CASES))])
def test_a_signal_in_any_phase_loses_no_finished_batch(
    phase, name, commands, undisturbed, tmp_path
):
    signum, code = SIGNALS[name]
    process = commands.begin(tmp_path, "--checkpoint.every_minutes=0")
    wait_for(tmp_path, phase, times=1 if phase == "start" else 3)
    send(process, signum)
    assert commands.end() == code
    error = (tmp_path / "err").read_text()
    assert "Traceback" not in error
    if phase == "start":
        assert "ended, nothing is saved" in error and not list(tmp_path.rglob("*.ckpt"))
        return
    batch = int(state(last(tmp_path))["state_dict"]["batches"])
    assert f"the state after batch {batch} is in" in error
    assert commands.run(tmp_path, "--ckpt_path", str(last(tmp_path))) == 0, error
    same_end(tmp_path, undisturbed)


def test_a_second_interrupt_ends_at_once(commands, tmp_path):
    signum, code = SIGNALS["INT"]
    process = commands.begin(tmp_path, "--checkpoint.every_minutes=0")
    wait_for(tmp_path, "saving", times=2)
    send(process, signum)
    send(process, signum)
    assert commands.end() == code
    assert marks(tmp_path)
