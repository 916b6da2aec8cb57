"""The study's arithmetic: pairing by seed, intervals, tables; the runs themselves are too long."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import study
import study_report

from scsdpo.statistics import detectable_difference, mean_interval

DOCS = Path(__file__).resolve().parents[2] / "docs"
SETTING = {"lr": 1e-4}


def result(method, seed, value):
    row = dict.fromkeys((*study_report.ENDS, *study_report.COSTS), 1.0)
    shares = ("solve_none", "informative", "solve_all")
    names = ("pass_rate", "medium", "response_length", "gradient_norm", "trained_rollouts", *shares)
    return row | {
        "method": method,
        "seed": seed,
        "setting": SETTING,
        "before": 0.4,
        "mean@16": value,
        "level1/mean@16": value,
        "windows": {"medium": [0.5, 0.25]},
        "validated_at": [0, 50],
        "validation": {k: [0.4, value] for k in ("mean@16", "maj@16", "level1/mean@16")},
        "training": {name: [0.25, 0.5, 0.25] for name in names},
    }


def test_differences_are_paired_by_seed_with_students_interval():
    """Seeds move both methods by 10 points; the second is ahead by 1 in each: told apart."""
    results = [result("a", s, 0.5 + 0.1 * s) for s in range(5)]
    results += [result("b", s, 0.51 + 0.1 * s + 1e-4 * s) for s in range(4)]
    rows = study_report.differences(results)
    row = next(r for r in rows if r["method"] == "b" and r["metric"] == "mean@16")
    gaps = [0.01 + 1e-4 * s for s in range(4)]
    assert row["baseline"] == "a" and row["n"] == 4 and row["ahead"] == 4 and row["tells"]
    assert row["low"] == pytest.approx(mean_interval(gaps).low)
    assert row["detectable"] == pytest.approx(detectable_difference(mean_interval(gaps)))
    back = next(r for r in rows if r["method"] == "a" and r["metric"] == "mean@16")
    assert back["mean"] == pytest.approx(-row["mean"]) and back["ahead"] == 0
    text = study_report.differences_table(rows, "a")
    assert "| b | +1.0 (+1.0 .. +1.0) ** | 4 of 4 | 0.0 | +0.0 (not known) | 0 of 4 | - |" in text


def test_one_seed_tells_nothing():
    rows = study_report.differences([result("a", 0, 0.5), result("b", 0, 0.9)])
    assert not any(row["tells"] for row in rows) and math.isnan(rows[0]["low"])


def test_bands_are_students_interval_point_by_point():
    low, high = study_report.bounds(torch.tensor([[0.0, 3.0], [1.0, 3.0]]))
    one = mean_interval([0, 1])
    assert (low, high) == (pytest.approx([one.low, 3]), pytest.approx([one.high, 3]))


def test_a_running_mean_looks_back_ten_batches():
    values = torch.arange(12.0)
    expected = [sum(range(max(0, i - 9), i + 1)) / min(i + 1, 10) for i in range(12)]
    torch.testing.assert_close(study_report.smooth(values).tolist(), expected)


def test_a_summary_reads_a_log_of_training_and_validation():
    shares = ("solve_none", "informative", "solve_all", "medium", "central")
    train = {f"train/{name}": 1.0 for name in shares}
    train |= {"train/pass_rate": 0.5, "train/response_length": 20.0}
    step = {"train/gradient_norm": 2.0, "train/trained_rollouts": 8.0, "train/trained_tokens": 99.0}
    start = {"batch": 0, "val/mean@16": 0.3, "val/maj@16": 0.2}
    middle = {"batch": 25} | train | step | {"val/mean@16": 0.4, "val/maj@16": 0.5}
    end = {"batch": 50} | train | {"val/mean@16": 0.6, "val/maj@16": 0.7}
    found = study.summary([start, middle, end])
    assert found["before"] == 0.3 and found["mean@16"] == 0.6 and found["steps"] == 1
    assert found["trained_rollouts"] == 8 and found["windows"]["medium"] == [1.0]
    assert found["validation"]["mean@16"] == [0.3, 0.4, 0.6]
    assert found["validated_at"] == [0, 25, 50]


def test_each_method_takes_its_best_rate_and_the_lower_of_equals():
    found = {("a", 1e-4): [0.5, 0.7], ("a", 3e-5): [0.6, 0.6], ("b", 1e-4): [0.2, 0.3]}
    assert study.chosen(found) == {"a": 3e-5, "b": 1e-4}


def test_a_run_is_one_of_scsdpo_compare_and_any_yaml_is_a_method(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.touch()
    args = study.parsed(["--methods", "sdpo", str(mine), "--out", str(tmp_path)])
    args.start = tmp_path / "start"
    setting = {"batches": 2, "val_size": 4, "val_every": 1, "val_seed": 0}
    todo = study.jobs(args, tmp_path, [("sdpo", 1e-4), (str(mine), 1e-4)], range(2), **setting)
    assert [cell[2] for cell in todo.values()] == [0, 0, 1, 1]
    run = list(todo)[-1]
    assert run.folder == tmp_path / "0.0001" / "mine" / "seed1"
    assert f"--trainer.default_root_dir={run.folder}" in run.words
    assert f"--config={mine}" in run.words and "--seed_everything=1" in run.words
    assert not run.is_done()


def test_the_report_is_tables_numbers_and_plots(tmp_path, capsys):
    results = [result(m, s, 0.5 + 0.1 * s) for m in ("a", "sdpo") for s in range(2)]
    found = {("a", 1e-4): [0.5], ("sdpo", 1e-4): [0.25]}
    study_report.write(results, found, [0.0, 0.5, 1.0, 1.0], ["sdpo", "absent"], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    plots = {"validation.png", "training.png", "pass_rates.png", "against-sdpo.png"}
    assert names == {"study.json", "study.md", *plots}
    text = (tmp_path / "study.md").read_text()
    assert "p = 0 25.0 %, between 25.0 %, p = 1 50.0 %" in text
    assert "| a | 2 | 0.0001 | 55.0 ± 7.1 |" in text and "| sdpo | 25.0 |" in text
    assert len(json.loads((tmp_path / "study.json").read_text())["runs"]) == 4


@pytest.mark.parametrize(
    ("page", "name", "runs", "baselines"),
    [
        ("study", "lr-3e-5", 35, ["sdpo", "sdpo-drop-degenerate"]),
        ("study", "lr-1e-4", 35, ["sdpo", "sdpo-drop-degenerate"]),
        ("study", "distilled-part", 20, ["sdpo-hybrid", "srpo"]),
        ("study-tools", "store", 12, ["sdpo", "grpo"]),
    ],
)
def test_the_tables_of_the_page_are_those_of_its_numbers(page, name, runs, baselines):
    text = (DOCS / f"{page}.md").read_text()
    record = json.loads((DOCS / "study" / f"{name}.json").read_text())
    assert len(record["runs"]) == runs
    again = study_report.differences(record["runs"])
    assert record["differences"] == [pytest.approx(row, nan_ok=True) for row in again]
    if name.startswith("lr-"):
        record["grid"] = json.loads((DOCS / "study" / "grid.json").read_text())
    start, *tables = study_report.markdown(record, baselines)
    assert " ".join(start.split()) in " ".join(text.split())
    assert all(table in text for table in tables)


def test_the_store_is_a_base_whose_start_is_the_policy_that_ships(tmp_path, capsys):
    short = ["--batches", "40", "--val-every", "40"]
    args = study.parsed(["--base", "tiny-tools", "--lrs", "3e-4", *short])
    assert study.configuration(args.base).is_file()
    assert (study.start_policy(tmp_path, args.base) / "config.json").is_file()
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):  # a grid of runs that are longer than those of the study
        study.parsed(["--lrs", "3e-4", "1e-4", *short])


def test_an_unknown_method_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        study.parsed(["--methods", "sdpo", "nonsense"])
    assert "nonsense is no file, and none of ad-opsd, dapo" in capsys.readouterr().err
