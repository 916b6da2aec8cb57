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


EPISODES = [
    "--model.sampling={n: 2, max_new_tokens: 90, stop: [a, e, i, o, u, '0', '1', '2', '3']}",
    "--data.train.verifier=worlds.Echo",
    "--data.train.verifier.turns=2",
    "--model.advantage.class_path=TurnRelative",
    "--model.teacher=NoTeacher",
    "--model.weighting=Uniform",
]


@pytest.mark.parametrize(("phase", "name"), [("sampling", "TERM"), ("update", "INT")])
def test_a_signal_in_an_episode_loses_no_finished_batch(phase, name, commands, tmp_path):
    signum, code = SIGNALS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert commands.run(whole, *EPISODES) == 0, (whole / "err").read_text()
    process = commands.begin(broken, *EPISODES, "--checkpoint.every_minutes=0")
    wait_for(broken, phase, times=3)
    send(process, signum)
    assert commands.end() == code
    error = (broken / "err").read_text()
    assert "Traceback" not in error
    assert commands.run(broken, *EPISODES, "--ckpt_path", str(last(broken))) == 0, error
    # Which episodes are drawn together depends on when their world answers: to rounding, so do the
    # sampler's log-probs, which this method does not read.
    same_end(broken, whole, rounded="train/logprob_gap")


def test_a_second_interrupt_ends_at_once(commands, tmp_path):
    signum, code = SIGNALS["INT"]
    process = commands.begin(tmp_path, "--checkpoint.every_minutes=0")
    wait_for(tmp_path, "saving", times=2)
    send(process, signum)
    send(process, signum)
    assert commands.end() == code
    assert marks(tmp_path)


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_run_without_training_ends_between_two_tokens(command, commands, tmp_path):
    process = commands.begin(tmp_path, command=command)
    wait_for(tmp_path, "sampling", times=1)
    send(process, SIGNALS["TERM"][0])
    assert commands.end() == 143
    assert "Traceback" not in (tmp_path / "err").read_text()


EPOCHS = [
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.val_check_interval=1.0",
    "--trainer.max_steps=-1",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=3",
]


@pytest.fixture(scope="module")
def undisturbed_epochs(commands, tmp_path_factory):
    """Two epochs of three batches, validated before and at the end of each."""
    folder = tmp_path_factory.mktemp("epochs")
    assert commands.run(folder, *EPOCHS) == 0, (folder / "err").read_text()
    return folder


@pytest.mark.parametrize(
    ("phase", "times"),
    [("validation", 2), ("validation", 3), ("saving", 3), ("saving", 4), ("update", 4)],
)
def test_a_run_by_epochs_goes_on_from_an_epochs_end(
    phase, times, commands, undisturbed_epochs, tmp_path
):
    """Amid its validation, before or after it, and in the first batch of the next one."""
    process = commands.begin(tmp_path, *EPOCHS, "--checkpoint.every_minutes=0")
    wait_for(tmp_path, phase, times=times)
    send(process, SIGNALS["TERM"][0])
    assert commands.end() == 143
    assert commands.run(tmp_path, *EPOCHS, "--ckpt_path=last") == 0, (tmp_path / "err").read_text()
    same_end(tmp_path, undisturbed_epochs)
