"""Checkpoints are whole or not there; what changed is found; a run stops only where it may."""

import os
import signal
import threading
import time

import pytest
import torch
from torch import distributed as dist

from scsdpo import interrupt
from scsdpo.checkpoints import (
    Checkpoint,
    Consequence,
    WholeFiles,
    changes,
    install,
    part_of,
    remove_parts,
)
from scsdpo.distributed import AbortVote


def write(path, text, folder):
    """A checkpoint that is a file, or a folder with a file."""
    part = part_of(path)
    if folder:
        part.mkdir()
        (part / "shard").write_text(text)
    else:
        part.write_text(text)
    return part


def read(path):
    return (path / "shard" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kinds", [(False,) * 3, (True,) * 3, (False, True, False)])
def test_the_last_two_are_kept_whether_files_or_folders(kinds, tmp_path):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for number, folder in enumerate(kinds):
        install(write(last, str(number), folder), last, previous)
        assert read(last) == str(number)
        assert number == 0 or read(previous) == str(number - 1)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_what_killed_writes_have_left_goes(tmp_path):
    write(tmp_path / "last.ckpt", "", folder=True)
    write(tmp_path / "best.ckpt", "", folder=False)
    (tmp_path / "last.ckpt").touch()
    os.utime(tmp_path / "best.ckpt.part", (0, 0))
    remove_parts(tmp_path, untouched=600)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.part"}
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.ckpt"
    WholeFiles().save_checkpoint({"a": torch.ones(2)}, path)

    def killed(content, to):
        to.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        WholeFiles().save_checkpoint({"a": torch.zeros(2)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(2))


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match=r"`Checkpoint\(every_minutes=...\)` must be >= 0, got -1"):
        Checkpoint(every_minutes=-1)


def test_a_folder_loses_its_name_before_its_content(tmp_path, monkeypatch):
    """Half of a checkpoint never goes by a checkpoint's name, also if the removal is killed."""
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for number in "012":
        install(write(last, number, folder=True), last, previous)

    def killed(path):
        raise KeyboardInterrupt

    part = write(last, "3", folder=True)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            install(part, last, previous)
    assert (read(last), previous.exists()) == ("2", False)
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt"}


def test_a_folder_that_is_being_written_is_nothing_left(tmp_path):
    part = write(tmp_path / "last.ckpt", "", folder=True)
    os.utime(part, (0, 0))  # files grow in it
    remove_parts(tmp_path, untouched=600)
    assert part.exists()


def config(**model):
    """A configuration with one object of each kind."""
    described = {
        "policy": {"name_or_path": "a", "adapter": {"class_path": "x.Lora", "init_args": {"r": 8}}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
        "teacher": {"class_path": "x.EMA", "init_args": {"rate": 0.05}},
    }
    return {"model": described | model, "seed_everything": 0}


@pytest.mark.parametrize(
    ("now", "said", "consequence"),
    [
        (
            config(optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-6}}),
            "model.optimizer.lr: 0.0001 -> 3e-06",
            Consequence.EFFECT,
        ),
        (
            config(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-4}}),
            "model.optimizer: AdamW -> SGD",
            Consequence.REFUSE,
        ),
        (
            config(teacher={"class_path": "x.Frozen", "init_args": {}}),
            "model.teacher: EMA -> Frozen",
            Consequence.WARN,
        ),
        (
            config(
                policy={
                    "name_or_path": "a",
                    "adapter": {"class_path": "x.Lora", "init_args": {"r": 4}},
                }
            ),
            "model.policy.adapter.r: 8 -> 4",
            Consequence.REFUSE,
        ),
        (config() | {"seed_everything": 1}, "seed_everything: 0 -> 1", Consequence.WARN),
    ],
)
def test_a_change_is_one_key_with_both_values_and_a_consequence(now, said, consequence):
    (change,) = changes(config(), now)
    assert (str(change), change.consequence) == (said, consequence)


def test_a_new_argument_with_a_default_and_what_is_no_part_of_a_run_are_no_changes():
    old = config()
    new = config(teacher={"class_path": "x.EMA", "init_args": {"rate": 0.05, "more": 1}})
    assert changes(old, new | {"ckpt_path": "x"}) == []


@pytest.fixture
def run():
    interrupt.reset()  # a step that failed in an earlier test has left its window open
    yield interrupt
    interrupt.reset()


def test_only_what_is_open_can_be_given_up(run):
    run.begin_run(None)
    run.ask(signal.SIGTERM)
    run.check()  # nothing is open
    with pytest.raises(run.Interrupted) as stop:
        run.open_window()
    assert stop.value.signum == signal.SIGTERM
    run.close_window()
    run.check()
    run.ask(signal.SIGINT)  # the first one counts
    with pytest.raises(run.Interrupted) as stop:
        run.open_window()
    assert stop.value.signum == signal.SIGTERM


@pytest.fixture
def agreements(monkeypatch):
    """Two ranks in one process, at one store."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return AbortVote(), AbortVote()


def test_a_window_is_given_up_by_all_ranks_or_none(agreements):
    first, second = agreements
    assert first.arrive(1) is None  # waits
    assert second.give_up(1, 15) == 15
    assert first.arrive(1) is False and first.give_up(1, 0) == 15
    # All were there: too late.
    assert first.arrive(2) is None
    assert second.arrive(2) is True
    assert first.give_up(2, 15) == 0 and first.arrive(2) is True
    assert first.heard() == 0
    second.tell(2)
    assert first.heard() == 2


def test_ranks_that_wait_at_the_end_of_a_window_leave_it_when_another_is_asked(agreements, run):
    mine, other = agreements
    run.begin_run(mine)
    run.open_window()
    threading.Timer(0.1, other.tell, [15]).start()
    start = time.monotonic()
    with pytest.raises(run.Interrupted):
        run.meet()
    assert time.monotonic() - start < 5
    assert other.give_up(1, 0) == 15


def test_a_rank_that_gives_up_has_told_the_others_which_may_be_sampling(agreements, run):
    mine, other = agreements
    run.begin_run(mine)
    run.open_window()  # it has just looked, and looks again in a while
    run.ask(15)
    with pytest.raises(run.Interrupted):
        run.meet()
    assert other.heard() == 15


def test_ranks_do_not_wait_for_ever(agreements, run, monkeypatch):
    monkeypatch.setattr(run, "_PATIENCE", 0.1)
    run.begin_run(agreements[0])
    run.open_window()
    with pytest.raises(TimeoutError, match="a rank is lost"):
        run.meet()
