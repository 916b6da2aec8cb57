"""Disks and loggers that fail cost lines of a log, and never a run."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scsdpo
from runs import Toys, data, module, trainer
from scsdpo.callbacks import BeforeAfter
from scsdpo.checkpoints import Checkpoint
from scsdpo.records import JsonLines, Outage, outage
from scsdpo.training.on_failure import newest_checkpoint

OTHERS = r"(the record of responses|health\.jsonl) failed, the run goes on"
"""Beside what a test is about."""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB, full but for what `free` gives back."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave=0):
    """Write until nothing fits, then free `leave` bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        os.ftruncate(file.fileno(), file.seek(0, os.SEEK_END) - leave)
    return filler


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class AtBatch(Callback):
    """`acts[k]()` at the start of batch k."""

    def __init__(self, acts):
        self.acts = acts

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.acts.get(batch_idx, lambda: None)()


def fit(qwen3, root, acts, questions=24, **settings):
    run = trainer(root, callbacks=[AtBatch(acts)], limit_val_batches=0, **settings)
    run.fit(module(qwen3), data(Toys(questions)))
    return run


def test_metrics_wait_for_a_disk_that_is_full(qwen3, small_disk, caplog):
    # A page of the file system has room for three lines.
    acts = {1: lambda: fill(small_disk), 8: lambda: (small_disk / "filler").unlink()}
    with (
        pytest.warns(UserWarning, match=OTHERS),
        pytest.warns(UserWarning, match=r"metrics.jsonl failed, .* No space left") as warned,
    ):
        run = fit(qwen3, small_disk, acts, questions=40)
    assert run.global_step == 10
    assert sum("metrics.jsonl" in str(w.message) for w in warned) == 1
    assert [line["batch"] for line in lines(small_disk / "metrics.jsonl")] == list(range(1, 11))
    assert "metrics.jsonl works again" in caplog.text


def test_metrics_survive_a_folder_that_vanishes(qwen3, tmp_path):
    folder = tmp_path / "run"
    run = fit(qwen3, folder, {3: lambda: shutil.rmtree(folder)})
    assert run.global_step == 6
    assert [line["batch"] for line in lines(folder / "metrics.jsonl")] == [4, 5, 6]


def test_metrics_wait_for_a_folder_that_is_no_folder(qwen3, tmp_path):
    folder, aside = tmp_path / "run", tmp_path / "aside"

    def spoil():
        folder.rename(aside)
        folder.write_text("a file")

    def mend():
        folder.unlink()
        aside.rename(folder)

    with (
        pytest.warns(UserWarning, match=OTHERS),
        pytest.warns(UserWarning, match="metrics.jsonl failed, the run goes on"),
    ):
        fit(qwen3, folder, {2: spoil, 4: mend})
    assert [line["batch"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_does_not_fit_leaves_the_lines_before(tmp_path):
    """A limit on the file's size takes a part of the line, as a full disk does."""
    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"batch": 1, "text": "a" * 50})
    kept = file.path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 10, before[1]))
    try:
        for write in (file.append, file.extend):
            with pytest.raises(OSError):
                write({"batch": 2, "text": "b" * 500})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.path.read_bytes() == kept
    file.append({"batch": 2})
    assert [line["batch"] for line in lines(file.path)] == [1, 2]


def test_tensorboard_without_space_costs_events_and_no_run(
    qwen3, small_disk, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.setattr(outage, "PAUSE", 0.0)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # ours goes with the test
    logger = TensorBoardLogger(small_disk, name="tb", version=0, max_queue=1)
    csv = CSVLogger(tmp_path, name="csv", version=0, flush_logs_every_n_steps=1)
    acts = {1: lambda: fill(small_disk), 4: lambda: (small_disk / "filler").unlink()}
    with pytest.warns(UserWarning) as warned:
        run = fit(qwen3, tmp_path, acts, logger=[csv, logger], log_every_n_steps=1)
    assert run.global_step == 6
    said = [str(w.message) for w in warned]
    assert sum("the logger TensorBoardLogger failed, the run goes on" in s for s in said) == 1, said
    assert "Traceback" not in capfd.readouterr().err
    assert "the logger TensorBoardLogger works again" in caplog.text
    steps = set()
    for events in (small_disk / "tb" / "version_0").glob("events*"):
        read = EventAccumulator(str(events))
        read.Reload()
        if "train/pass_rate" in read.Tags()["scalars"]:
            steps |= {event.step for event in read.Scalars("train/pass_rate")}
    assert 0 in steps and 5 in steps  # before the fault, and after it


class Down(Logger):
    """A server that does not answer."""

    name, version, save_dir = "down", 0, None

    def __init__(self):
        super().__init__()
        self.calls = 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        raise ConnectionError("no route to host")

    def finalize(self, status):
        raise ConnectionError("no route to host")


def test_a_logger_whose_server_is_down_is_left_alone_for_a_while(qwen3, tmp_path):
    logger = Down()
    with pytest.warns(UserWarning, match="the logger Down failed, .* no route to host"):
        run = fit(qwen3, tmp_path, {}, logger=logger, log_every_n_steps=1)
    assert run.global_step == 6 and logger.calls == 1
    assert len(lines(tmp_path / "down" / "version_0" / "metrics.jsonl")) == 6


def test_what_failed_is_tried_again_after_a_pause(monkeypatch):
    now, broken = [0.0], [True]
    monkeypatch.setattr(outage.time, "monotonic", lambda: now[0])
    tries = []

    def work():
        tries.append(now[0])
        if broken[0]:
            raise OSError("down")

    thing = Outage("it", OSError, pause=60)
    with pytest.warns(UserWarning, match="it failed"):
        assert not thing.attempt(work)
    now[0] = 59
    assert not thing.attempt(work)
    now[0], broken[0] = 61, False
    assert thing.attempt(work) and tries == [0, 61]
    with pytest.raises(KeyError):
        thing.attempt(lambda: {}["other"])


def test_the_table_at_the_end_is_printed_where_its_file_cannot_be_written(
    qwen3, small_disk, capsys
):
    run = trainer(small_disk, callbacks=[BeforeAfter(), AtBatch({2: lambda: fill(small_disk)})])
    with pytest.warns(UserWarning, match="No space left"):
        run.fit(module(qwen3), data())
    assert "before ->" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_is_said_and_the_run_goes_on(qwen3, small_disk, tmp_path):
    """The model has 700 KB, the file system 64: no checkpoint can be written there."""
    saved = Checkpoint(dirpath=small_disk, save_last=True, every_n_epochs=1)
    run = trainer(tmp_path, callbacks=[saved], enable_checkpointing=True, max_epochs=2)
    with pytest.warns(UserWarning, match="saving a checkpoint failed, the run goes on") as warned:
        run.fit(module(qwen3), data())
    assert run.global_step == 6
    assert sum("saving a checkpoint failed" in str(w.message) for w in warned) == 1
    assert newest_checkpoint(run) is None  # what is there is incomplete, and not taken for whole


def test_an_older_checkpoint_stays_where_the_newer_does_not_fit(qwen3, tmp_path, monkeypatch):
    saved = Checkpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=1)
    run = trainer(tmp_path, callbacks=[saved], enable_checkpointing=True, max_epochs=2)
    save = run.strategy.save_checkpoint

    def first_only(content, path, *args, **kwargs):
        if content["epoch"] > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    run.strategy.save_checkpoint = first_only
    with pytest.warns(UserWarning, match="saving a checkpoint failed"):
        run.fit(module(qwen3), data())
    assert newest_checkpoint(run).name == "epoch=0.ckpt"


def test_a_folder_that_cannot_be_written_at_the_start_is_one_line(tmp_path):
    """`runs` is a file: nothing of the run could be kept."""
    (tmp_path / "runs").write_text("")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "scsdpo", "fit", "--config", str(root / "configs/tiny.yaml")]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(scsdpo.__file__).parents[1]),
    }
    command += ["--trainer.num_sanity_val_steps=0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode in (2, 3), done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "runs" in done.stderr.strip().splitlines()[-1]
