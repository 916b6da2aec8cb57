"""What a run writes and says: it costs no run where it cannot be written, and is read back torn."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.text import Text

import scsdpo.__main__ as main
from made_up_runs import made_up_run
from runs import Toys, data, module, trainer
from scsdpo.callbacks import BeforeAfter, before_after_table
from scsdpo.callbacks.progress import _most_informative, _print
from scsdpo.checkpoints import Checkpoint, newest_whole, read_back
from scsdpo.checkpoints.choosing import highest_number
from scsdpo.cli import lightning_cli
from scsdpo.cli.signals import Handlers
from scsdpo.errors import ConfigurationError
from scsdpo.io.console import Terminal
from scsdpo.io.files import whole_lines, write_whole
from scsdpo.io.text import in_one_line, printable
from scsdpo.records import JsonLines, Outage, lock
from scsdpo.report import read_runs, render

SOURCE = Path(__file__).resolve().parents[2] / "src"
NULS = b"\0" * 300 + b"\n"
WRITES = """
import sys
from scsdpo.io import streams
streams.guard()
for _ in range(3000):
    print("a line \\u00b7 of output \\U0001d6fc")
print("end \\u00b7", file=sys.stderr)
lost = streams.finish()
sys.exit(7 if lost else 5)
"""


LOST = "scsdpo: standard output cannot be written, and is lost: No space left on device"


def said(script, *words, shell=None, **environment):
    """Exit code, standard output and error of a Python program."""
    command = [sys.executable, *(["-c", script] if script else ["-m", "scsdpo"]), *words]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, capture_output=True, env=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        ("", 5, ["end ·"]),
        (">&-", 5, ["end ·"]),
        ("| head -1; exit ${PIPESTATUS[0]}", 5, ["end ·"]),
        ("> /dev/full", 7, [LOST, "end ·"]),
        ("2>&-", 5, []),
        ("2> /dev/full", 5, []),
    ],
)
def test_an_output_that_cannot_be_written_ends_nothing(shell, code, error):
    found, _, told = said(WRITES, shell=shell)
    assert (found, told.splitlines()) == (code, error)


def test_a_character_that_an_encoding_lacks_is_spelled_out():
    code, out, told = said(WRITES, PYTHONIOENCODING="ascii")
    assert code == 5 and out.splitlines()[0] == r"a line \xb7 of output \U0001d6fc"
    assert told == "end \\xb7\n"


def test_what_is_opened_after_a_closed_output_does_not_become_it(tmp_path):
    script = f"""
import os
from scsdpo.io import streams
streams.guard()
file = open({str(tmp_path / "x")!r}, "w")
os.write(1, b"lost")
os.write(2, b"lost")
file.write("kept")
"""
    assert said(script, shell=">&- 2>&-")[0] == 0
    assert (tmp_path / "x").read_text() == "kept"


def test_a_command_whose_reader_leaves_ends_quietly_and_one_whose_disk_is_full_does_not():
    assert said("", "fit", "--help", shell="| true; exit ${PIPESTATUS[0]}") == (0, "", "")
    assert said("", "--help", shell=">&-") == (0, "", "")
    code, _, told = said("", "plan", "--help", shell="> /dev/full")
    assert code == 3 and told.count("\n") == 1


def test_text_of_others_does_not_act_on_a_terminal():
    assert printable("\x1b[2Ja\rb\x9bc\u202ed\u200be\x00\ud800") == (
        r"\x1b[2Ja\rb\x9bc\u202ed\u200be\x00\ud800"
    )
    plain = "ü ✓ 数 ½\u00a0|\u3000|\tx\ny"
    assert printable(plain) == plain
    assert in_one_line("a\n\x1b[31m b\r\nc") == r"a \x1b[31m b c"


HOSTILE = "[/math] [bold]x[/] :smile: \x1b[2J"


def test_markup_in_a_category_is_text(capsys):
    figures = {"mean@4": 0.5, f"{HOSTILE}/mean@4": 0.25, "b/mean@4": 0.5}
    console = Terminal()
    console.width = 120
    console.print(before_after_table(figures, figures))
    console.print(f"files of {HOSTILE}", soft_wrap=True)
    out = capsys.readouterr().out
    assert out.count(r"[/math] [bold]x[/] :smile: \x1b[2J") == 2 and "\x1b" not in out


def test_what_is_said_above_richs_bar_is_no_markup():
    shown = []
    bar = SimpleNamespace(print=shown.append)
    _print(SimpleNamespace(progress_bar_callback=bar), "[/math]")
    (text,) = shown
    assert isinstance(text, Text) and text.plain == str(text) == "[/math]"


def test_the_question_that_is_shown_is_the_one_that_teaches_most():
    assert _most_informative([0.0, 1.0, 0.125, 0.625, 0.375, 0.0]) == 3
    assert _most_informative([0.0, 1.0]) == 0


def test_a_warning_of_the_command_is_one_line_of_text():
    assert main._in_one_line(UserWarning("a\nb \x1b[2J"), UserWarning, "x.py", 3) == (
        "warning: a b \\x1b[2J\n"
    )


def test_lightnings_tips_are_left_out_and_what_it_says_of_a_run_is_not():
    def told(text):
        record = logging.LogRecord("x", logging.INFO, "", 1, text, None, None)
        return lightning_cli._tells_of_the_run(record)

    tip = "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]"
    assert not told(tip) and not told("TPU available: False, using: 0 TPU cores")
    assert told("`Trainer.fit` stopped: `max_epochs=1` reached.")
    assert told("GPU available: True (cuda), used: True")


def test_results_are_written_before_the_table_is_shown(qwen3, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("no table")

    monkeypatch.setattr(Terminal, "print", broken)
    run = trainer(tmp_path, callbacks=[BeforeAfter()], limit_train_batches=1)
    with pytest.warns(UserWarning, match="the table at the end failed, .* no table"):
        run.fit(module(qwen3), data(Toys(4), Toys(2)))
    assert json.loads((tmp_path / "before_after.json").read_text())["after"]


# ------------------------------------------------------------------ torn lines


def test_a_torn_line_is_named_and_passed_over(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    lines = [b'{"batch": 1}\n', NULS, b'{"batch": 2, "te\n', b'{"batch": 3}\n', b"[4]\n", b"{}\n"]
    path.write_bytes(b"".join(lines) + NULS[:-1] + b'{"batch": 5}\n' + b'{"batch": 6')
    assert [line["batch"] for line in whole_lines(path, "batch")] == [1, 3, 5]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"scsdpo: {path}, line {n} is incomplete and was skipped" for n in (2, 3, 5, 6)]


def test_a_record_goes_on_behind_a_torn_line(tmp_path, capsys):
    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"batch": 1}, {"batch": 2})
    with file.path.open("ab") as end:
        end.write(NULS + b'{"batch": 3}\n{"batch": 4}\n')
    file.cut(3)
    assert [line["batch"] for line in whole_lines(file.path)] == [1, 2, 3]
    assert "line 3 is incomplete" in capsys.readouterr().err
    with file.path.open("ab") as end:
        end.write(NULS[:-1])  # cut off, without an end
    assert file.last == {}
    file.append({"batch": 4})
    assert [line["batch"] for line in whole_lines(file.path, "batch")] == [1, 2, 3, 4]
    assert file.last == {"batch": 4}


def test_a_lone_surrogate_can_be_written_and_read(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"text": "a\ud800b"})
    assert file.last == {"text": "a\ud800b"}
    write_whole(tmp_path / "y", "a\ud800b")
    assert (tmp_path / "y").read_text() == r"a\ud800b"


def test_a_report_is_made_of_what_is_whole(tmp_path, capsys):
    run = made_up_run(tmp_path / "run", batches=21, alarm=True)
    (run / "environment.json").write_text("{}")
    (run / "analysis.json").write_text("{}")
    torn = [path for path in sorted(run.rglob("*")) if path.is_file()]
    whole = torn.pop(torn.index(run / "metrics.jsonl"))
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join([*lines[:5], NULS, *lines[6:]]))
    for path in torn:
        path.write_bytes(NULS * 3)
    assert "21" in render(read_runs([str(run)]))
    told = capsys.readouterr().err
    assert f"{whole}, line 6 is incomplete" in told
    tokens = {path for path in torn if path.parent.name == "tokens"}  # read beside their responses
    assert not [path for path in torn if str(path) not in told and path not in tokens]


# ----------------------------------------------------------------- checkpoints


def test_a_callbacks_state_that_cannot_be_read_back_is_named_and_left_out(tmp_path):
    kinds = {"A": Path("x"), "B": [1.5, "x", {"t": torch.ones(2)}], "C": lambda: 0}
    content = {"state_dict": {"w": torch.ones(3)}, "callbacks": dict(kinds)}
    with pytest.warns(UserWarning) as warned:
        read_back.save(content, tmp_path / "x.ckpt")
    told = [str(each.message) for each in warned]
    assert [line.split()[5] for line in told] == ["A", "C"] and "PosixPath" in told[0]
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"].keys() == {"B"}


def test_any_other_state_that_cannot_be_read_back_stops_the_run_at_its_first_save(tmp_path):
    content = {"callbacks": {}, "remembered": {"weighting": Path("x")}, "epoch": 1}
    with pytest.raises(ConfigurationError, match=r"^checkpoint: remembered cannot be read back"):
        read_back.save(content, io.BytesIO())


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path):
    paths = [tmp_path / name / "last.ckpt" for name in "abc"]
    for number, path in enumerate(paths, 1):
        path.parent.mkdir()
        torch.save({"number": number}, path)
        os.utime(path, (1e9 - number, 1e9 - number))  # a clock that runs backwards
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "last.ckpt").write_bytes(paths[0].read_bytes()[:50])
    folders = [path.parent for path in paths] + [tmp_path / "d"]
    assert newest_whole(*folders) == paths[2]
    assert highest_number([tmp_path]) == 3


def test_numbers_go_on_from_those_of_older_runs(qwen3, tmp_path):
    def numbers(root):
        saved = Checkpoint(dirpath=root / "checkpoints", save_last=True, every_minutes=0)
        run = trainer(root, callbacks=[saved], enable_checkpointing=True, limit_train_batches=2)
        run.fit(module(qwen3), data(Toys(8), Toys(2)))
        assert saved.unsaved(run) == ""
        names = ("previous.ckpt", "last.ckpt")
        return [torch.load(root / "checkpoints" / n, weights_only=True)["number"] for n in names]

    first, second = numbers(tmp_path), numbers(tmp_path)
    assert [*first, *second] == sorted({*first, *second})


def test_a_last_state_that_is_gone_or_was_refused_is_said(qwen3, tmp_path, monkeypatch):
    saved = Checkpoint(dirpath=tmp_path / "kept", save_last=True)
    run = trainer(tmp_path, callbacks=[saved], enable_checkpointing=True, limit_train_batches=1)
    run.fit(module(qwen3), data(Toys(4), Toys(2)))
    assert saved.unsaved(run) == ""
    last = tmp_path / "kept" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-50])
    assert saved.unsaved(run) == f"{last} was saved, but cannot be read any more"
    saved._place, saved._outage.error = None, OSError(28, "No space left on device")
    assert saved.unsaved(run).endswith("batch 1 is not saved: [Errno 28] No space left on device")


def test_a_run_that_began_no_batch_owes_no_state(qwen3, tmp_path):
    saved = Checkpoint(dirpath=tmp_path, save_last=True)
    run = trainer(tmp_path, callbacks=[saved], enable_checkpointing=True, max_steps=0)
    run.fit(module(qwen3), data(Toys(4), Toys(2)))
    assert saved.unsaved(run) == ""


# ------------------------------------------------------------ locks and signals


def test_a_folder_has_one_run_and_a_killed_one_leaves_it_free(tmp_path):
    folder = tmp_path / "run"
    child = os.fork()
    if child == 0:
        lock._take(folder.resolve())
        time.sleep(60)
        os._exit(0)
    try:
        while not (folder / lock.NAME).exists() or not (folder / lock.NAME).read_text():
            time.sleep(0.01)
        fault = lock._fault(folder, needed=False)
        assert f"{folder}: another run writes there (pid {child} on " in fault
        assert "trainer.default_root_dir" in fault
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert lock._fault(folder, needed=True) == ""
    assert lock._fault(folder, needed=True) == ""  # the same run, once more
    lock.release(folder)
    assert not (folder / lock.NAME).exists()


def test_a_folder_that_cannot_be_written_matters_where_checkpoints_go(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    assert "cannot be written: Not a directory" in lock._fault(folder, needed=True)
    assert lock._fault(folder, needed=False) == ""
    assert "cannot be locked" in capsys.readouterr().err


def test_the_end_of_a_terminal_asks_like_a_scheduler_unless_nohup_has_spoken():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for ignored in (True, False):
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
            with Handlers() as handlers:
                assert (signal.getsignal(signal.SIGHUP) is handlers) is not ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_part_that_works_is_no_sign_that_the_whole_does(caplog):
    outage = Outage("it", OSError)

    def fail():
        raise OSError("down")

    with pytest.warns(UserWarning, match="it failed") as warned:
        assert not outage.attempt(fail)
        assert outage.attempt(lambda: None, part=True) and outage.error is not None
        assert not outage.attempt(fail)
    assert len(warned) == 1
    assert outage.attempt(lambda: None) and outage.error is None
