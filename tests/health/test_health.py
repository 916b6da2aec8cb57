"""Warnings: each rule speaks where its formula says, once, and good runs hear nothing."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from runs import Always, Toys, data, module, trainer
from scsdpo.health import (
    Agreement,
    EntropyCollapse,
    EntropyRise,
    Health,
    HeldOutFalls,
    ImportanceCapped,
    LengthCollapse,
    Mastered,
    NoSuccess,
    SamplerDrift,
    Series,
    Truncation,
    shipped_rules,
)
from scsdpo.records import HealthRecord

ROOT = Path(__file__).resolve().parents[2]


def judged(batches, rules=None):
    """Rule -> the batch, from 1, at which it speaks."""
    past, said = Series(), {}
    for number, figures in enumerate(batches, start=1):
        past.add(figures)
        for rule in rules or shipped_rules():
            if type(rule).__name__ not in said and rule.look(past):
                said[type(rule).__name__] = number
    return said


def path(first, last, steps, t):
    """From `first` to `last` in `steps` batches, by the same factor each."""
    return first * (last / first) ** (min(t, steps) / steps)


def series(steps=45, **ends):
    return [
        {f"train/{name}": path(*pair, steps, t) for name, pair in ends.items()}
        for t in range(steps)
    ]


SMOLLM2 = {
    "divergence": (0.041, 0.013),
    "entropy": (2.3, 3.5),
    "truncated": (0.66, 0.8),
    "pass_rate": (0.359, 0.131),
}
"""SC-SDPO on SmolLM2-135M in 45 steps, as issue 16 has it: first and last."""


def test_the_run_that_got_worse_with_nothing_said_is_warned_of_within_ten_batches():
    said = judged(series(**SMOLLM2))
    assert said["Truncation"] <= 10 and said["Agreement"] <= 10
    held_out = [{"val/mean@8": path(0.359, 0.131, 3, t)} for t in range(4)]
    assert judged(held_out) == {"HeldOutFalls": 3}
    assert judged(held_out[:1] + held_out[3:]) == {"HeldOutFalls": 2}


def test_the_run_that_got_better_from_the_same_start_hears_of_truncation_alone():
    better = SMOLLM2 | {
        "pass_rate": (0.359, 0.652),
        "response_length": (33, 9),
        "entropy": (2.3, 0.3),
    }
    assert judged(series(**better)).keys() == {"Truncation"}


def recorded(name):
    return [json.loads(line) for line in Path(__file__).with_name(name).read_text().splitlines()]


def test_a_good_run_of_the_lab_hears_nothing():
    lines = recorded("lab_figures.jsonl")
    assert len(lines) == 101 and judged(lines) == {}


def test_a_recorded_run_of_sc_sdpo_on_smollm2_is_warned_of_by_its_tenth_batch():
    lines = recorded("smollm2_figures.jsonl")
    said = {rule: lines[line - 1]["batch"] for rule, line in judged(lines).items()}
    assert said["Truncation"] == 5 and said["EntropyRise"] == 10 and said["Agreement"] == 14


def test_a_fall_in_a_warm_up_is_none_and_one_behind_it_is():
    """Figures of Gemma-3-270M: the warm-up unlearns the plain answer, SC-SDPO learns it again."""
    warmup = [{"warmup/examples": 8.0}] * 2
    start = [{"val/mean@8": 0.246}, *warmup, {"val/mean@8": 0.2}, *warmup, {"val/mean@8": 0.08}]
    assert judged([*start, {"val/mean@8": 0.05}, {"val/mean@8": 0.4}]) == {}
    assert judged([*start, {"val/mean@8": 0.4}, {"val/mean@8": 0.02}]) == {"HeldOutFalls": 9}
    merged = [{**warmup[0], "val/mean@8": 0.08}]  # as metrics.jsonl has them
    assert judged([start[0], *merged, {"val/mean@8": 0.05}]) == {}


RATES = (0.2, 0.2, 0.3, 0.32, 0.29, 0.3)
"""The last two are not above the first two by .1."""
CASES = [
    (NoSuccess(batches=3), [{"pass_rate": p} for p in (0, 0, 0.1, 0, 0, 0)], 6),
    (Mastered(batches=2), [{"solve_all": s} for s in (1, 0.7, 0.95, 0.95)], 4),
    (Truncation(batches=2), [{"truncated": s} for s in (0.3, 0.3, 0.31, 0.3)], 3),
    (SamplerDrift(batches=2), [{"logprob_gap": g} for g in (0.001, 0.02, 0.03)], 3),
    (ImportanceCapped(batches=2), [{"importance_capped": s} for s in (0, 0.05, 0.06)], 3),
    (HeldOutFalls(), [{"val/mean@2": v} for v in (0.5, 0.44, 0.46, 0.44, 0.43)], 5),
    (HeldOutFalls(), [{"val/mean@2": v} for v in (0.5, 0.36, 0.34)], 3),
    (HeldOutFalls(), [{"val/mean@2": v} for v in (0.246, 0.13, 0.096)], 3),
    (HeldOutFalls(), [{"val/mean@2": v} for v in (0.08, 0.035, 0.08, 0.02)], 4),
    (
        LengthCollapse(batches=2),
        [{"response_length": n, "pass_rate": 0.5} for n in (100, 100, 60, 30, 30)],
        4,
    ),
    (
        EntropyCollapse(batches=2),
        [{"entropy": h, "pass_rate": 0.5} for h in (1, 1, 0.31, 0.3, 0.28)],
        5,
    ),
    (
        EntropyCollapse(batches=2),
        [{"entropy": 0.2 if t > 1 else 1, "pass_rate": p} for t, p in enumerate(RATES)],
        6,
    ),
]


@pytest.mark.parametrize(("rule", "batches", "when"), CASES, ids=lambda x: type(x).__name__)
def test_a_rule_speaks_where_its_formula_says(rule, batches, when):
    assert judged(batches, [rule]) == {type(rule).__name__: when}


@pytest.mark.parametrize("rule", [LengthCollapse(batches=2), EntropyCollapse(batches=2)])
def test_what_falls_while_the_pass_rate_rises_is_no_collapse(rule):
    batches = [
        {"response_length": 0.1**t, "entropy": 0.1**t, "pass_rate": 0.1 * t} for t in range(6)
    ]
    assert judged(batches, [rule]) == {}


def test_agreement_needs_both_to_fall_and_more_than_noise():
    rule = Agreement(batches=3)
    falls = [{"divergence": 1.0 - t / 20, "pass_rate": 0.8 - t / 20} for t in range(10)]
    assert judged(falls, [rule]) == {"Agreement": 6}
    assert judged([f | {"divergence": 1.0} for f in falls], [rule]) == {}
    assert judged([f | {"pass_rate": 0.5} for f in falls], [rule]) == {}
    noisy = [0.9, 0.1, 0.8, 0.7, 0.1, 0.5, 0.9, 0.1, 0.8, 0.7]
    noise = [f | {"pass_rate": p} for f, p in zip(falls, noisy, strict=True)]
    assert judged(noise, [rule]) == {}


def test_entropy_must_rise_by_more_than_noise_while_the_pass_rate_does_not():
    rule = EntropyRise(batches=3)
    rises = [{"entropy": 1 + t / 50 + (t > 2), "pass_rate": 0.5} for t in range(10)]
    assert judged(rises, [rule]) == {"EntropyRise": 6}
    assert judged([f | {"pass_rate": t / 10} for t, f in enumerate(rises)], [rule]) == {}
    assert judged([f | {"entropy": 1 + f["entropy"] / 10} for f in rises], [rule]) == {}
    noisy = [0.5, 2.5, 0.6, 3.0, 0.7, 2.9, 0.9, 3.1, 0.8, 2.7]
    assert judged([{"entropy": h, "pass_rate": 0.5} for h in noisy], [rule]) == {}


def test_figures_that_are_not_numbers_are_passed_over():
    past = Series()
    past.add({"train/entropy": None, "train/reward": float("nan"), "note": "x", "batch": 1})
    assert not past["entropy"] and not past["reward"] and list(past["batch"]) == [1]


class Tables(DummyLogger):
    """As W&B's: logs tables."""

    name, version, save_dir = "tables", "0", None

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_text(self, key, columns, data):
        self.logged.append((key, columns, data))


def test_a_warning_is_given_once_and_a_resumed_run_knows(qwen3, tmp_path, capsys):
    board = TensorBoardLogger(tmp_path, name="run", version="0")
    tables = Tables()

    def fit(batches, **given):
        rules = (NoSuccess(batches=2), Mastered())
        run = trainer(
            tmp_path,
            callbacks=[Health(rules=rules)],
            logger=[board, tables],
            limit_train_batches=batches,
            limit_val_batches=0,
            log_every_n_steps=1,
        )
        run.fit(module(qwen3), data(Toys(20, verifier=Always(0.0))), **given)
        return run

    saved = tmp_path / "run" / "0" / "checkpoints" / "x.ckpt"
    fit(3).save_checkpoint(saved)
    (line,) = (tmp_path / "run/0/health.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.keys() == HealthRecord.__annotations__.keys()
    assert (record["rule"], record["batch"], record["step"]) == ("NoSuccess", 2, 0)
    said = capsys.readouterr().err
    assert said.count("warning (NoSuccess, batch 2): not one response was right in 2 batches") == 1
    assert "Look at rollouts/" in said
    ((columns, rows),) = [logged[1:] for logged in tables.logged if logged[0] == "health"]
    assert columns == ["batch", "rule", "warning"] and rows[0][0] == "2"
    board.experiment.flush()
    events = b"".join(path.read_bytes() for path in (tmp_path / "run" / "0").glob("events*"))
    assert b"not one response was right" in events

    fit(5, ckpt_path=saved)
    assert "NoSuccess" not in capsys.readouterr().err
    assert (tmp_path / "run/0/health.jsonl").read_text().splitlines() == [line]


def test_the_page_has_every_rule_with_its_formula_and_thresholds():
    page = (ROOT / "docs" / "health.md").read_text()
    for rule in shipped_rules():
        (row,) = re.findall(rf"^\| `{type(rule).__name__}` \|.*$", page, re.MULTILINE)
        assert is_dataclass(rule) and type(rule).remedy
        for field in fields(rule):
            assert f"`{field.name}: {getattr(rule, field.name):g}`" in row, (row, field.name)


def test_a_window_must_hold_two_batches():
    with pytest.raises(ValueError, match=r"Truncation\(batches=...\)` must be >= 2, got 1"):
        Truncation(batches=1)
