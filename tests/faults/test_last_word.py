"""`fit` ends with 0 if its last state was saved and can be read back, and only then."""

import fcntl
import os
import signal
import subprocess

import pytest
from stopping import last, same_end, send, state, wait_for

EVERY = "--checkpoint.every_minutes=0"


def error(folder):
    return (folder / "err").read_text()


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 MB, in the folder of a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    while os.path.ismount(folder):  # one may lie over the other
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FILL = "dd if=/dev/zero of=disk/filler bs=4k status=none 2> /dev/null; true"
READ_ONLY = "mount --bind $PWD/disk $PWD/disk && mount -o remount,bind,ro $PWD/disk"
ON_DISK = ["--trainer.logger.save_dir=disk", EVERY]


def test_a_disk_that_fills_up_is_said_and_is_no_success(commands, undisturbed, disk, tmp_path):
    assert commands.run(tmp_path, *ON_DISK, acts={"3": FILL}) == 3
    said = error(tmp_path)
    assert "Traceback" not in said and said.count("saving a checkpoint failed") == 1
    *_, word = said.strip().splitlines()
    assert word.startswith("scsdpo: error: the state after batch 8 is not saved: ")
    assert word.endswith(
        "[Errno 28] No space left on device; the newest complete checkpoint is "
        f"{last(disk).relative_to(tmp_path)}"
    )
    assert int(state(last(disk))["state_dict"]["batches"]) == 2
    (disk / "filler").unlink()
    assert commands.run(tmp_path, *ON_DISK, "--ckpt_path=last") == 0, error(tmp_path)
    same_end(disk, undisturbed)


def test_a_disk_that_has_room_again_costs_nothing(commands, undisturbed, disk, tmp_path):
    acts = {"3": FILL, "6": "rm disk/filler"}
    assert commands.run(tmp_path, *ON_DISK, acts=acts) == 0, error(tmp_path)
    assert "saving a checkpoint works again" in error(tmp_path)
    same_end(disk, undisturbed)


def test_a_file_system_that_turns_read_only_ends_no_run(commands, disk, tmp_path):
    # A signal comes too: what it asks for is not done either, and 143 would say that it was.
    process = commands.begin(tmp_path, *ON_DISK, acts={"3": READ_ONLY})
    wait_for(tmp_path, "update", times=6, seconds=60)
    send(process, signal.SIGTERM)
    assert commands.end() == 3
    said = error(tmp_path)
    assert "Traceback" not in said and "Read-only file system" in said
    *_, word = said.strip().splitlines()
    assert "is not saved" in word and "the newest complete checkpoint is" in word


def test_logs_that_cannot_be_written_from_the_start_cost_no_training(
    commands, undisturbed, disk, tmp_path
):
    subprocess.run(FILL, shell=True, cwd=tmp_path, check=True)
    kept = tmp_path / "kept"
    assert commands.run(tmp_path, *ON_DISK, f"--checkpoint.dirpath={kept}") == 0, error(tmp_path)
    assert "Traceback" not in error(tmp_path) and "config.yaml failed" in error(tmp_path)
    mine, theirs = (state(last(folder))["global_step"] for folder in (kept, undisturbed))
    assert mine == theirs == 8


def test_checkpoints_that_cannot_be_written_from_the_start_are_one_line(commands, disk, tmp_path):
    subprocess.run(FILL, shell=True, cwd=tmp_path, check=True)
    assert commands.run(tmp_path, *ON_DISK) == 2
    *_, word = error(tmp_path).strip().splitlines()
    assert "cannot be written: No space left on device" in word
    assert "Loading weights" not in error(tmp_path)


@pytest.mark.parametrize("output", [{"unread": True}, {"out": "/dev/full"}])
def test_an_output_that_nobody_can_read_costs_nothing(output, commands, undisturbed, tmp_path):
    assert commands.run(tmp_path, **output) == 0, error(tmp_path)
    same_end(tmp_path, undisturbed)


def test_a_run_in_the_folder_of_a_living_one_is_refused_before_it_touches_it(commands, tmp_path):
    plain = ["--trainer.logger=false", "--trainer.default_root_dir=one", "--trainer.max_steps=1"]
    (tmp_path / "one").mkdir()
    config = tmp_path / "one" / "config.yaml"
    config.write_text("of the other")
    with (tmp_path / "one" / "run.lock").open("w") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        other.write("pid 77 on a machine since then\n")
        other.flush()
        assert commands.run(tmp_path, *plain) == 2
    *_, word = error(tmp_path).strip().splitlines()
    assert "another run writes there (pid 77 on a machine since then); stop it, or give" in word
    assert config.read_text() == "of the other" and "Traceback" not in error(tmp_path)
    assert commands.run(tmp_path, *plain) == 0, error(tmp_path)  # nobody holds it any more


def test_nohup_is_respected(commands, undisturbed, tmp_path):
    process = commands.begin(tmp_path, nohup=True)
    wait_for(tmp_path, "update", times=2)
    send(process, signal.SIGHUP)
    assert commands.end() == 0, error(tmp_path)
    same_end(tmp_path, undisturbed)


def test_the_end_of_a_terminal_saves(commands, undisturbed, tmp_path):
    process = commands.begin(tmp_path, EVERY)
    wait_for(tmp_path, "update", times=2)
    send(process, signal.SIGHUP)
    assert commands.end() == 143, error(tmp_path)
    # The clock is set back between the two parts, and the second one is stopped too.
    future = last(tmp_path).stat().st_mtime + 10**7
    for path in tmp_path.rglob("*.ckpt"):
        os.utime(path, (future, future))
    assert commands.run(tmp_path, EVERY, "--ckpt_path=last", "--trainer.max_steps=6") == 0
    (tmp_path / "err").unlink()
    assert commands.run(tmp_path, EVERY, "--ckpt_path=last", "--trainer.max_steps=7") == 0
    assert "version_1/checkpoints/last.ckpt" in error(tmp_path)


def test_a_callbacks_odd_state_is_left_out_and_the_run_goes_on_from_there(
    commands, undisturbed, tmp_path
):
    odd = "--trainer.callbacks+=odd_state.PathKeeper"
    assert commands.run(tmp_path, odd, EVERY, "--trainer.max_steps=4") == 0, error(tmp_path)
    assert error(tmp_path).count("the state of the callback PathKeeper cannot be read back") == 1
    assert commands.run(tmp_path, odd, "--ckpt_path=last") == 0, error(tmp_path)
    same_end(tmp_path, undisturbed)


def test_lines_that_a_power_cut_has_torn_are_named_at_resume(commands, undisturbed, tmp_path):
    assert commands.run(tmp_path, "--trainer.max_steps=4") == 0, error(tmp_path)
    run = last(tmp_path).parents[1]
    for path in (run / "metrics.jsonl", run / "health.jsonl"):
        with path.open("ab") as file:
            file.write(b"\0" * 512 + b"\n")
    assert commands.run(tmp_path, "--ckpt_path=last") == 0, error(tmp_path)
    assert "Traceback" not in error(tmp_path)
    assert "metrics.jsonl, line 6 is incomplete and was skipped" in error(tmp_path)
    same_end(tmp_path, undisturbed)
