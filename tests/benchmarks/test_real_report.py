"""The tables of benchmarks on SmolLM2: which runs they take, pairs by seed, intervals; the page."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import real_report
import will_it_work

from real_rows import cut_off, row
from scsdpo.statistics import detectable_difference, mean_interval


def test_a_file_has_a_run_a_line_in_order(tmp_path):
    rows = [row("sdpo", 1, 0.5), row("sdpo", 0, 0.5), row("grpo", 0, 0.5, policy="warm")]
    real_report.write(rows, tmp_path / "runs.json")
    first, *lines, last = (tmp_path / "runs.json").read_text().splitlines()
    assert (first, last, len(lines)) == ("[", "]", 3)
    assert real_report.read(tmp_path / "runs.json") == [rows[1], rows[0], rows[2]]
    assert real_report.read(tmp_path / "absent.json") == []


def test_a_new_run_replaces_that_of_its_method_seed_policy_and_device():
    old = [row("sdpo", 0, 0.25), row("sdpo", 0, 0.25, device="H200")]
    new = row("sdpo", 0, 0.75)
    assert real_report.merged(old, [new]) == [new, old[1]]
    assert real_report.merged(old, [cut_off("sdpo", 0)]) == old
    assert real_report.merged([cut_off("sdpo", 0)], [new]) == [new]


def test_the_tables_take_whole_runs_on_cpu_before_others():
    rows = [
        row("a", 0, 0.5, device="H200"),
        row("a", 0, 0.75),
        row("a", 1, 0.5, device="H200"),
        row("a", 1, 0.75, pass_rate=None, cpu_seconds=None),
        cut_off("a", 2),
    ]
    assert real_report.chosen(rows) == [rows[1], rows[2]]
    text = real_report.others_table(rows)
    assert "| `a` | 0 | H200 | smol | another run of this seed | 0: 25.0, 30: 50.0 |" in text
    assert "| `a` | 1 | CPU | smol | no log | 0: 25.0, 30: 75.0 |" in text
    assert "| `a` | 2 | CPU | smol | cut off after 16 batches | 0: 25.0, 15: 12.5 |" in text
    assert text.count("\n") == 2 + 3
    assert real_report.others_table([row("a", 0, 0.5)]) == ""


def test_a_pair_is_of_one_device_where_both_have_a_run_there():
    rows = [
        row("a", 0, 0.5),
        row("a", 0, 0.25, device="H200"),
        row("b", 0, 0.75, device="H200"),
        row("a", 1, 0.5),
        row("b", 1, 0.75, device="H200"),
        row("b", 2, 0.75),
    ]
    assert real_report.pairs(rows, "a", "b") == [(rows[1], rows[2]), (rows[3], rows[4])]
    assert real_report.pairs(rows, "b", "a") == [(rows[2], rows[1]), (rows[4], rows[3])]


def test_differences_are_paired_by_seed_with_students_interval():
    gaps = [0.125, 0.25, 0.375]
    rows = [row("grpo", seed, 0.25) for seed in range(3)]
    rows += [row("sdpo", seed, 0.25 + gap) for seed, gap in enumerate(gaps)]
    rows += [row("two", seed, 0.25) for seed in range(2)]
    rows[-3] = rows[-3] | {"device": "H200"}
    found = real_report.differences(rows, "grpo")
    assert {one["method"] for one in found} == {"`sdpo` (on two devices: 2)"}
    mean = found[0]
    assert (mean["metric"], mean["mean"], mean["ahead"], mean["n"]) == ("mean@8", 0.25, 3, 3)
    assert mean["low"] == pytest.approx(mean_interval(gaps).low)
    assert mean["detectable"] == pytest.approx(detectable_difference(mean_interval(gaps)))


def test_ends_are_seed_by_seed_with_the_interval_of_the_gain():
    rows = [row("a", 0, 0.5), row("a", 1, 0.75, device="H200"), row("a", 2, 1.0)]
    gains = mean_interval([25, 50, 75])
    said = f"| +50.0 ({gains.low:+.1f} .. {gains.high:+.1f}) | +25.0 |"
    text = real_report.ends_table([row("b", 0, 0.25), *rows])
    first, second = text.splitlines()[2:]
    assert first.startswith(f"| `a` | 3 | 0: 50.0; 1 (H200): 75.0; 2: 100.0 | 75.0 {said} 30.0 ->")
    assert "| 2.00 -> 1.00 | 0.12 -> 0.75 | 10 |" in first
    assert second.startswith("| `b` | 1 | 0: 25.0 | 25.0 | +0.0 | +0.0 |")


def test_policies_have_tables_of_their_own_and_costs_are_told_by_device():
    rows = [row("a", 0, 0.5, policy=name, cpu_seconds=3600.0) for name in ("smol", "warm")]
    rows[1] |= {"device": "H200", "mean@8 before": 0.375, "warnings": {"Agreement": 7}}
    first, _, quiet, second, _, loud, costs = real_report.tables(rows)
    assert first.startswith("Smol, 1 run: mean@8 25.0 %, maj@8 50.0 % before")
    assert second.startswith("After a warm-up, 1 run: mean@8 37.5 %")
    assert "| `a` | 0: none |" in quiet and "| `a` | 0 (H200): Agreement at 7 |" in loud
    assert costs == "CPU hours: 1.0 for 1 run on CPU, 1.0 for 1 run on the host of an H200.\n"


def test_the_tables_of_the_page_are_those_of_its_numbers():
    page = will_it_work.PAGE.read_text()
    assert will_it_work.filled(page) == page


def test_a_page_without_a_mark_is_refused():
    with pytest.raises(ValueError, match="lacks <!-- checks --> or <!-- end of checks -->"):
        will_it_work.filled("<!-- checks -->")
