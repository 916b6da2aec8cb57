"""What is seen of a run while it trains."""

import re
from types import SimpleNamespace

import pytest

from runs import Toys, data, module, trainer
from scsdpo.callbacks import Progress
from scsdpo.callbacks.progress import _batches_left, _wrong_and_right_in_turn
from test_health import Tables


def test_figures_speed_time_left_and_responses_are_said_and_logged(qwen3, tmp_path, capsys):
    tables = Tables()
    run = trainer(
        tmp_path,
        callbacks=[Progress(every=2, responses=2, responses_every=2)],
        logger=tables,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    run.fit(module(qwen3), data(Toys(12)))
    out = capsys.readouterr().out
    lines = re.findall(r"^batch (\d) of 3, (\S+) left · pass rate (\S+) · (.*)$", out, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "3"]
    assert lines[-1][1] == "0:00:00" and "truncated" in lines[0][3]
    assert re.search(r"tokens/s: rollout [\d,]+, teacher [\d,]+, student [\d,]+$", lines[0][3])
    keys = [(key, len(rows)) for key, _, rows in tables.logged if key == "responses"]
    assert keys == [("responses", 1), ("responses", 2), ("responses", 3), ("responses", 4)]
    _, columns, rows = tables.logged[-1]
    assert columns == ["batch", "question", "response", "verdict", "gold answer"]
    assert [row[0] for row in rows] == ["1", "1", "3", "3"]  # appended, none lost
    assert all(row[3].startswith(("right", "wrong")) for row in rows)
    assert out.count("  verdict: ") == 4


def test_wrong_and_right_responses_are_shown_in_turn():
    assert _wrong_and_right_in_turn([True, True, False, True]) == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_epochs": 2, "max_steps": -1, "global_step": 5}, 13),
        ({"max_epochs": -1, "max_steps": 10, "global_step": 5}, 7),
        ({"max_epochs": 1, "max_steps": 10, "global_step": 0}, 3),
        ({"max_epochs": -1, "max_steps": -1, "global_step": 5}, float("inf")),
    ],
)
def test_batches_left_follow_from_epochs_and_steps(limits, left):
    given = SimpleNamespace(num_training_batches=10, **limits)
    assert _batches_left(given, 7) == left


@pytest.mark.parametrize("name", ["every", "responses", "responses_every"])
def test_a_negative_setting_is_refused(name):
    with pytest.raises(ValueError, match=rf"Progress\({name}=...\)` must be >= 0, got -1"):
        Progress(**{name: -1})
