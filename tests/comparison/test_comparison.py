"""`scsdpo compare`: paired by question, paired by seed, and the runs that are missing."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scsdpo.cli import compare
from scsdpo.comparison import Job, by_seed, compare_questions, execute, run_all, stars
from scsdpo.comparison.table import with_interval
from scsdpo.errors import ConfigurationError
from scsdpo.evaluation import Result, figures
from scsdpo.statistics import detectable, mean_interval, score_difference, t_quantile
from test_cli import scsdpo  # noqa: F401 - a fixture
from test_evaluation import question

ABOUT = {"policy": "p", "split": "val", "batch": 3, "sampling": {"n": 2}}


def result(*rewards, about=ABOUT, keys=None):
    keys = keys or [f"q/{i}" for i in range(len(rewards))]
    rows = [question(key, rewards=each) for key, each in zip(keys, rewards, strict=True)]
    return Result(about=about, questions=rows)


A = result((1.0, 0.0), (1.0, 1.0), (0.0, 0.0))
B = result((1.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def test_a_comparison_pairs_questions_and_lists_those_won_and_lost():
    found = compare_questions(A, B, names=("a", "b"))
    rows = {row.name: row for row in found.rows}
    assert rows["mean@2"].difference == score_difference([0.5, 1, 0], [1, 0.5, 1])
    assert rows["pass@2"].difference == score_difference([1, 1, 0], [1, 1, 1])
    assert rows["mean@2"].a.value == 0.5 and rows["mean@2"].b.value == pytest.approx(5 / 6)
    assert [(a.key, b.key) for a, b in found.won] == [("q/2", "q/2"), ("q/0", "q/0")]
    assert [a.key for a, _ in found.lost] == ["q/1"]


def test_a_comparison_does_not_depend_on_the_order_of_questions_and_pairs_twins_in_order():
    turned = result(*(q.rewards for q in reversed(B.questions)), keys=["q/2", "q/1", "q/0"])
    assert (
        compare_questions(A, turned, names=("a", "b")).rows
        == compare_questions(A, B, names=("a", "b")).rows
    )
    twins = [result((0.0, 0.0), (1.0, x), keys=["same", "same"]) for x in (0.0, 1.0)]
    assert [b.rewards for _, b in compare_questions(*twins, names=("a", "b")).won] == [(1.0, 1.0)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result((1.0, 0.0), (1.0, 1.0)), r"1 only in the first, 0 only in the second.*'q/2'"),
        (result((1.0,), (1.0,), (1.0,)), "a has 2 responses to a question and b 1"),
    ],
)
def test_what_cannot_be_paired_is_refused(other, message):
    with pytest.raises(ConfigurationError, match=message):
        compare_questions(A, other, names=("a", "b"))


def test_seeds_are_paired_and_several_intervals_hold_together():
    """Seeds move both by 10 points; b is ahead by about 1 in each that both have."""
    a = {seed: {"mean@2": 0.5 + 0.1 * seed} for seed in range(5)}
    b = {seed: {"mean@2": 0.51 + 0.101 * seed} for seed in (0, 1, 2, 3, 9)}
    (row,) = by_seed(a, b, ["mean@2"], comparisons=10)
    gaps = [0.01 + 0.001 * seed for seed in range(4)]
    expected = mean_interval(gaps)
    for bound in ("value", "low", "high"):
        assert getattr(row.difference, bound) == pytest.approx(getattr(expected, bound))
    assert row.joint.low == pytest.approx(mean_interval(gaps, level=0.995).low)
    assert row.difference.tells and row.ahead == 4 and row.difference.n == 4
    (alone,) = by_seed({0: a[0]}, {0: b[0]}, ["mean@2"])
    assert math.isnan(alone.difference.low) and not alone.difference.tells


def test_a_figures_interval_is_chosen_by_its_scores_and_not_by_its_name():
    """mean@k and pass@1 of rewards of 0 and 1 are one number with one interval, everywhere."""
    rng = random.Random(0)
    for k in (1, 4):
        a, b = (
            result(*(tuple(float(rng.random() < 0.8) for _ in range(k)) for _ in range(12)))
            for _ in range(2)
        )
        one, two = (figures(each.questions)[""] for each in (a, b))
        for found in (one, two):
            assert found[f"mean@{k}"] == found["pass@1"]
        rows = {row.name: row for row in compare_questions(a, b, names=("a", "b")).rows}
        mean, passed = rows[f"mean@{k}"], rows["pass@1"]
        assert replace(mean, name="pass@1") == passed
        if k == 1:
            assert replace(rows["maj@1"], name="pass@1") == passed  # of 0 and 1, too


def test_what_is_findable_uses_the_deviation_of_the_interval_beside_it():
    """half = t(n - 1) s / sqrt(n), and findable = s detectable(n), for every figure."""
    for a, b in ((A, B), (A, A), (B, A)):
        for row in compare_questions(a, b, names=("a", "b")).rows:
            one = row.difference
            if math.isnan(one.low):
                assert row.name == "response_length" and math.isnan(row.detectable)
                continue
            half = max(one.high - one.value, one.value - one.low)
            assert one.high - one.low > 0 and not one.tells
            deviation = half * 3**0.5 / t_quantile(0.975, 2)
            assert row.detectable == pytest.approx(deviation * detectable(3))
            assert row.detectable > half


def test_seeds_whose_differences_coincide_tell_nothing_and_are_not_marked():
    """Two seeds, three; also where the same difference is rounded otherwise."""
    for seeds, step in ((2, 0.0), (3, 0.0), (2, 0.1), (3, 0.1)):
        a = {seed: {"mean@2": 0.1 + step * seed} for seed in range(seeds)}
        b = {seed: {"mean@2": 0.3 + step * seed} for seed in range(seeds)}
        (row,) = by_seed(a, b, ["mean@2"], comparisons=5)
        assert row.difference.value == pytest.approx(0.2) and math.isnan(row.difference.low)
        assert stars(row) == "" and math.isnan(row.detectable) and row.ahead == seeds
        shown = with_interval(row.difference, row.name, stars(row))
        assert shown == "+20.0 (not known)"
    b[0]["mean@2"] += 0.01
    (row,) = by_seed(a, b, ["mean@2"])
    assert row.difference.high - row.difference.low > 0.01


def test_files_are_compared_and_the_answers_of_both_are_shown(scsdpo, tmp_path):  # noqa: F811
    A.write(tmp_path / "a.json")
    B.write(tmp_path / "runs" / "b" / "evaluations" / "val-9.json")
    A.write(tmp_path / "runs" / "b" / "evaluations" / "val-10.json")
    B.write(tmp_path / "b.json")
    code, shown, error = scsdpo("compare", "a.json", "b.json", base=[])
    assert code == 0, error
    assert "won 2, lost 1 questions" in shown and "right 2x '2'" in shown
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    (one,) = record["duels"]
    assert [q["key"] for q in one["won"]] == ["q/2", "q/0"] and one["won"][0]["gold"] == "2"
    assert one["rows"][0]["difference"]["value"] == pytest.approx(1 / 3)
    # A run is its last validation, here as good as the file.
    assert scsdpo("compare", "a.json", "runs/b", "--out=x/y.json", base=[])[0] == 0
    record = json.loads((tmp_path / "x" / "y.json").read_text())
    assert record["duels"][0]["rows"][0]["difference"]["value"] == 0


def test_folders_of_seeds_are_methods(scsdpo, tmp_path):  # noqa: F811
    for name, results in (("grpo", (A, A, A)), ("sdpo", (A, B, B))):
        for seed, one in enumerate(results):
            one.write(tmp_path / name / f"seed{seed}" / "evaluations" / "val-3.json")
    assert list(compare.seeds_in(tmp_path / "grpo")) == [0, 1, 2]
    code, shown, error = scsdpo("compare", "grpo", "sdpo", base=[])
    assert code == 0, error
    assert "2 of 3" in shown and "intervals, of which" in shown
    record = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    row = record["methods"]["sdpo"][0]
    assert row["name"] == "mean@2" and row["difference"]["value"] == pytest.approx(2 / 9)
    assert record["comparisons"] == len(record["methods"]["sdpo"])
    late = result((1.0, 0.0), (1.0, 1.0), (0.0, 0.0), about=ABOUT | {"batch": 2})
    late.write(tmp_path / "sdpo" / "seed1" / "evaluations" / "val-3.json")
    code, _, error = scsdpo("compare", "grpo", "sdpo", base=[])
    assert code == 2 and "must have the same batches before its last validation: 3 and 2" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.json"], "name two or more, each once"),
        (["--configs", "a.yaml", "--seeds=2"], "name two or more, each once"),
        (["--configs", "a.yaml", "b/a.yaml"], "names must differ, got a, a"),
        (["--configs", "a.yaml", "b.yaml"], "--configs: a.yaml does not exist"),
        (["a", "b", "--jobs=0"], "--jobs must be >= 1, got 0"),
        (["a", "b", "--configs", "c", "d"], "give either --configs or existing results, not both"),
    ],
)
def test_mistakes_are_one_line(args, message, scsdpo):  # noqa: F811
    code, _, error = scsdpo("compare", *args, base=[])
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_configs_are_run_seed_by_seed_what_is_done_is_not_and_what_was_begun_goes_on(
    scsdpo,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    commands = []

    def fake(words, output, *, threads):
        folder = Path(next(w for w in words if "default_root_dir" in w).partition("=")[2])
        commands.append(words[3:])
        if len(commands) == 3:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            raise RuntimeError("exit status 1, see output.txt")
        (A if "grpo" in str(folder) else B).write(folder / "evaluations" / "val-3.json")
        return 1.0

    monkeypatch.setattr("scsdpo.comparison.running.execute", fake)
    for name in ("base", "grpo", "sdpo"):
        (tmp_path / f"{name}.yaml").write_text("model: {}")
    call = ["compare", "--config", "base.yaml", "--configs", "grpo.yaml", "sdpo.yaml"]
    call += ["--seeds=2", "--out=study", "--model.limits.clip=2"]
    code, shown, error = scsdpo(*call, base=[])
    assert code == 3 and "1 of 4 runs failed; run it again to go on" in error
    assert "grpo, seed 1: exit status 1" in shown and len(commands) == 4
    assert commands[0] == [
        *("fit", "--config=base.yaml", "--model.limits.clip=2", "--config=grpo.yaml"),
        *("--seed_everything=0", "--trainer.default_root_dir=study/grpo/seed0"),
        *("--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    ]
    code, shown, error = scsdpo(*call, base=[])
    assert code == 0, error
    assert len(commands) == 5
    assert commands[-1][-1] == "--ckpt_path=study/grpo/seed1/checkpoints/last.ckpt"
    assert "2 of 2" in shown and (tmp_path / "study" / "comparison.json").exists()
    code, _, error = scsdpo(*call, "--trainer.max_steps=5", base=[])
    assert code == 2 and "is of another command (--trainer.max_steps=5): choose another" in error


def test_a_run_that_failed_names_its_output_and_the_others_go_on(tmp_path):
    output = tmp_path / "deep" / "output.txt"
    with pytest.raises(RuntimeError, match=r"exit status 3, see .*output\.txt"):
        execute([sys.executable, "-c", "print(7, flush=True); exit(3)"], output)
    assert output.read_text() == "7\n"
    said = []
    jobs = [Job(name=n, folder=tmp_path / n, words=("--nonsense",)) for n in "ab"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "done.json").write_text('{"command": ["--nonsense"]}')
    assert [job.name for job in run_all(jobs, 2, said.append)] == ["a"]
    assert len(said) == 1 and said[0].startswith("a: exit status 2, see")


def test_a_policy_is_evaluated_once_for_each_set_of_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def fake(words, output):
        calls.append(words)
        A.write(Path(next(w for w in words if w.startswith("--out=")).partition("=")[2]))

    monkeypatch.setattr(compare, "execute", fake)
    for _ in range(2):
        assert compare.evaluated("org/name", ["--config=x"]) == A
    assert len(calls) == 1 and calls[0][3:5] == ["validate", "--policy=org/name"]
    compare.evaluated("org/name", ["--config=y"])
    assert len(calls) == 2
