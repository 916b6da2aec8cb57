"""`scsdpo rates` and `scsdpo analyze`: runs of a policy without training."""

import json
import math
from pathlib import Path

import pytest
import torch

from scsdpo.analysis import teacher_distance
from table_policy import G, TablePolicy, judged
from test_configs import CONFIGS, scsdpo, small  # noqa: F401 - a fixture

TINY = CONFIGS / "tiny.yaml"
PACED = CONFIGS / "methods" / "sdpo-paced.yaml"


def test_rates_are_written_once_and_train_the_run_that_they_belong_to(qwen3, scsdpo, capsys):  # noqa: F811
    shrunk = [*small(qwen3), "--data.train.size=4"]
    kept = [arg for arg in shrunk if "limit_train" not in arg]
    assert scsdpo("rates", "--config", TINY, *shrunk, "--out", "rates.json") in (0, None)
    written = json.loads(Path("rates.json").read_text())
    assert len(written["rates"]) == 4 and all(n == 4 for _, n in written["rates"].values())
    # A random model solves nothing: PACED has nothing to weigh, and says so.
    assert scsdpo("fit", "--config", TINY, "--config", PACED, *kept) == 2
    assert "every weight is 0" in capsys.readouterr().err
    written["rates"] = {key: [1, 4] for key in written["rates"]}
    Path("rates.json").write_text(json.dumps(written))
    assert scsdpo("fit", "--config", TINY, "--config", PACED, *kept) in (0, None)
    # Found before the weights are loaded, and also where only a later question is missing.
    for other in ("--data.train.seed=9", "--data.train.size=5"):
        arguments = ("--config", TINY, "--config", PACED, *kept, other)
        assert scsdpo("fit", *arguments, "--model.policy.name_or_path=tiny") == 2
        assert "has no rate of question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rates", "--config", TINY], "the following arguments are required: --out"),
        (["rates", "--config", TINY, "--out", "."], "--out: . is a folder"),
        (["rates", "--config", TINY, "--out", "x", "--ckpt_path=y"], "write a checkpoint's"),
        (["analyze", "--config", TINY, "--out", "x", "--rollouts", "0"], "--rollouts must be >= 1"),
        (
            ["analyze", "--config", TINY, "--out", "x", "--model.teacher=NoTeacher",
             "--model.advantage=GroupRelative"],
            "NoTeacher has no distance to measure",
        ),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(args, message, scsdpo, capsys):  # noqa: F811
    assert scsdpo(*args) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_analyze_writes_the_four_measures_of_the_shipped_policy(scsdpo):  # noqa: F811
    options = ["--questions", "8", "--rollouts", "4", "--data.val_questions_per_batch=5"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert scsdpo("analyze", "--config", TINY, "--out", "figure", *options, *quiet) in (0, None)
    report = json.loads(Path("figure/analysis.json").read_text())
    assert Path("figure/analysis.png").stat().st_size > 0
    assert set(report["measures"]) == set(teacher_distance.MEASURES)
    assert len({row["key"] for row in report["rows"]}) <= 8
    for row in report["rows"]:
        assert row["pass_rate"] > 0 and row["values"]["jsd"] >= 0
    for name, measure in report["measures"].items():
        width = measure["edges"][1] - measure["edges"][0]
        for density in measure["density"].values():
            assert not density or sum(density) * width == pytest.approx(1, rel=1e-3)
        assert sum(group["n"] for group in measure["by_pass_rate"]) == len(report["rows"]), name


def test_the_four_measures_are_those_of_plain_loops(monkeypatch):
    from scsdpo.advantage import SelfDistillation
    from scsdpo.rollout import Rollout
    from scsdpo.teacher import Frozen
    from scsdpo.training import PolicyOptimizer
    from scsdpo.types import Sampling
    from test_methods import Case, sibling

    given = judged()

    class Given(Rollout):
        def sample(self, policy, prompts, sampling):
            return given.responses

    policy = TablePolicy()
    model = PolicyOptimizer(
        policy,
        SelfDistillation(),
        Frozen(),
        rollout=Given(),
        sampling=Sampling(n=G),
    )
    model.configure_model()
    with torch.no_grad():
        policy.table += 0.5
        policy.table[:, 0] += 1
    monkeypatch.setattr(model, "judge", lambda _: given)
    rows = teacher_distance.measure_batch(model, given.prompts, Sampling(n=G))
    case, expected = Case(model, judged()), []
    for q, g in case.rows():
        told = sibling(case, q, g)
        if not told:
            continue
        sums = dict.fromkeys(teacher_distance.MEASURES, 0.0)
        for t in range(case.length(q, g)):
            log_s, log_t = case.log_s(q, g, t).tolist(), case.log_t(q, g, t, told).tolist()
            log_m = [
                math.log((math.exp(a) + math.exp(b)) / 2) for a, b in zip(log_s, log_t, strict=True)
            ]
            y = case.y(q, g, t)
            kl = [math.exp(a) * (a - b) for a, b in zip(log_s, log_t, strict=True)]
            halves = [
                math.exp(x) * (x - m) / 2
                for logs in (log_s, log_t)
                for x, m in zip(logs, log_m, strict=True)
            ]
            values = (sum(kl), sum(halves), log_t[y] - log_s[y], (log_s[y] - log_m[y]) / 2)
            for name, value in zip(teacher_distance.MEASURES, values, strict=True):
                sums[name] += value / case.length(q, g)
        expected.append(sums)
    assert len(rows) == len(expected) > 5
    for row, sums in zip(rows, expected, strict=True):
        assert row.values == pytest.approx(sums, rel=1e-9, abs=1e-12)
