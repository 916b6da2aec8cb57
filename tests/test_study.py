"""The study's arithmetic: pairing by seed, intervals, tables; the runs themselves are too long."""

import importlib.util
import math
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "study.py"
spec = importlib.util.spec_from_file_location("study", PATH)
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def result(method, seed, value):
    row = dict.fromkeys(study.COLUMNS, 1.0) | {"mean@16": value, "level1/mean@16": value}
    curves = {"mean@16": [0.4, value], "pass rate": [0.3, 0.4]}
    return row | {"method": method, "seed": seed, "curves": curves}


def test_differences_are_paired_by_seed():
    """Seeds move both methods by 10 points; the second is ahead by 1 in each: told apart."""
    results = [result("a", s, 0.5 + 0.1 * s) for s in range(5)]
    results += [result("b", s, 0.51 + 0.1 * s) for s in range(4)]
    (row,) = study.pairs(results, "mean@16")
    assert row["n"] == 4 and row["mean"] == pytest.approx(0.01)
    assert row["tells"] and row["low"] == pytest.approx(0.01)
    text = study.markdown(results, [row])
    assert "| b - a | 4 | +1.0 | +1.0 .. +1.0 | yes |" in text


def test_a_bootstrap_interval_holds_the_mean_and_needs_two_seeds():
    low, high = study.bootstrap([0.0, 1.0, 2.0, 3.0])
    assert 0 <= low < 1.5 < high <= 3
    assert all(math.isnan(x) for x in study.bootstrap([1.0]))
    (row,) = study.pairs([result("a", 0, 0.5), result("b", 0, 0.9)], "mean@16")
    assert not row["tells"]


def test_a_summary_reads_a_log_of_training_and_validation():
    train = {"train/pass_rate": 0.5, "train/medium": 1.0, "train/response_length": 20.0}
    step = {"train/gradient_norm": 2.0, "train/trained_rollouts": 8.0, "train/trained_tokens": 99.0}
    val = {"val/mean@16": 0.4, "val/maj@16": 0.5}
    log = [train | step, val, train, {"val/mean@16": 0.6, "val/maj@16": 0.7}]
    found = study.summary(log, {"mean@16": 0.3, "maj@16": 0.2})
    assert found["before"] == 0.3 and found["mean@16"] == 0.6 and found["steps"] == 1
    assert found["trained_rollouts"] == 8 and found["medium_by_window"] == [1.0]
    assert found["curves"]["mean@16"] == [0.3, 0.4, 0.6]


def test_the_report_is_three_files(tmp_path, capsys):
    study.report([result("a", s, 0.5) for s in range(2)], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"study.json", "study.md", "study.png"}


def test_an_unknown_method_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        study.parsed(["--methods", "sdpo", "nonsense"])
    assert "nonsense is none of dapo, dr-grpo" in capsys.readouterr().err
