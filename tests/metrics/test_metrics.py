"""The training log, and what the callbacks show and write."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from kernel_inputs import of_rewards
from runs import Toys, data, module, trainer
from scsdpo.callbacks import BeforeAfter, before_after_table
from scsdpo.callbacks.before_after import why_no_steps
from scsdpo.metrics import episode_metrics, rollout_metrics
from scsdpo.types import Episode, Part
from scsdpo.weighting import PassRate, Uniform
from streams import Counting


def judged(successes, lengths, *, finished):
    """One rollout batch with the given successes [Q, G] and lengths [Q, G]."""
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    zeros = torch.zeros(mask.shape)
    tables = {"sampling_logprobs": zeros, "policy_logprobs": zeros, "ids": zeros.long()}
    return of_rewards(successes, sampled=mask, ended=finished, **tables)


def test_rollout_metrics_have_their_closed_form():
    successes = torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 0]])
    lengths = torch.tensor([[2, 4], [6, 8], [1, 3], [5, 3]])
    result = judged(successes, lengths, finished=lengths < 8)
    logged = rollout_metrics(result, PassRate().weigh(result))
    assert logged["pass_rate"] == 0.5 and logged["informative"] == 0.5
    assert logged["solve_none"] == 0.25 and logged["solve_all"] == 0.25
    assert logged["medium"] == logged["central"] == 0.5
    assert logged["response_length"] == 4 and logged["truncated"] == 1 / 8
    assert logged["effective_questions"] == pytest.approx(2)  # two equal weights, two zeros
    logged = rollout_metrics(result, Uniform().weigh(result))
    assert logged["effective_questions"] == pytest.approx(4)


def test_medium_questions_have_an_eighth_to_seven_eighths_and_central_ones_a_quarter_to_three():
    successes = (torch.arange(8) < torch.arange(9)[:, None]).float()  # k = 0..8 of 8
    lengths = torch.ones(9, 8)
    result = judged(successes, lengths, finished=lengths > 0)
    logged = rollout_metrics(result, Uniform().weigh(result))
    assert logged["medium"] == pytest.approx(7 / 9) and logged["central"] == pytest.approx(5 / 9)


def test_figures_of_episodes_have_their_closed_form():
    """Rollouts 0 and 1 of one question; rollout 2 is a response of one turn.

    Tokens by rollout: 2 drawn, 3 of a tool, 1 drawn; 4 drawn; 5 drawn.
    """
    mask = torch.tensor([[[1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]]).bool()
    zeros = torch.zeros(mask.shape)
    tables = {"sampling_logprobs": zeros, "policy_logprobs": zeros, "ids": zeros.long()}
    batch = of_rewards(torch.tensor([[1.0, 0.0, 1.0]]), sampled=mask, **tables)
    said, tool = Part(role="assistant", text=""), Part(role="tool", text="")
    answered = replace(tool, reward=0.25, calls=3, failed=1)
    episodes = (Episode(parts=(said, answered, tool, said)), Episode(parts=(said,)), Episode())
    ended, late, plain = batch.verdicts[0]
    batch = replace(
        batch,
        verdicts=((replace(ended, stopped="turns"), replace(late, stopped="time"), plain),),
        responses=replace(
            batch.responses,
            present=mask | (torch.arange(6) < torch.tensor([[6, 4, 5]])[..., None]),
            turns=torch.tensor([[[0, 0, 0, 0, 0, 1]] + [[0] * 6] * 2], dtype=torch.int32),
            episodes=(episodes,),
        ),
    )
    assert episode_metrics(batch) == {
        "turns": 1.5, "calls": 1.5, "failed_calls": 1 / 3, "observation_tokens": 1.5,
        "out_of_turns": 0.5, "out_of_time": 0.5,
        "turn_1/reward": 0.125, "turn_1/length": 3.0,  # (.25 + 0) / 2, (2 + 4) / 2
        "turn_2/reward": 1.0, "turn_2/length": 1.0,
    }  # fmt: skip
    assert episode_metrics(of_rewards(torch.ones(2, 2))) == {}
    no_calls = replace(batch.responses, episodes=((Episode(parts=(said,)),) * 3,))
    assert "failed_calls" not in episode_metrics(replace(batch, responses=no_calls))


def test_before_and_after_are_printed_and_written(qwen3, tmp_path, capsys):
    callback = BeforeAfter()
    run = trainer(
        tmp_path, log_every_n_steps=1, num_sanity_val_steps=-1, callbacks=[callback], logger=True
    )
    run.fit(module(qwen3), data())
    written = json.loads(next(tmp_path.rglob("before_after.json")).read_text())
    assert written["before"] == callback.before and written["after"] == callback.after
    assert set(written["before"]) == set(written["after"]) >= {"mean@2", "maj@2", "even/mean@2"}
    shown = capsys.readouterr().out
    assert "before -> after" in " ".join(shown.split()) and "optimizer steps taken" in shown


@pytest.mark.parametrize(
    ("asked", "counts", "figures", "said"),
    [
        (0, {}, {}, "no batch was sampled"),
        (3, {"skipped": 3, "bad": 3}, {}, "none of 3 batches had a finite loss"),
        (3, {}, {}, "model.selection had not collected"),
        (3, {"skipped": 3}, {"solve_none": 1, "solve_all": 0}, "no response of the last one"),
        (3, {"skipped": 3}, {"solve_none": 0, "solve_all": 1}, "these questions are mastered"),
        (3, {"skipped": 3}, {"solve_none": 0.5, "solve_all": 0.5}, "all right or all wrong"),
        (3, {"skipped": 3}, {"solve_none": 0, "solve_all": 0.5}, "model.weighting gives"),
    ],
)
def test_a_run_without_a_step_says_why(asked, counts, figures, said):
    steps = SimpleNamespace(**({"skipped": 0, "bad": 0} | counts))
    shown = {f"train/{name}": value for name, value in figures.items()}
    trainer = SimpleNamespace(callback_metrics=shown)
    assert said in why_no_steps(trainer, SimpleNamespace(batches=asked, steps=steps))


def test_the_reason_for_no_step_and_questions_that_were_trained_on_are_printed(
    qwen3, tmp_path, capsys
):
    run = trainer(tmp_path, callbacks=[BeforeAfter()], max_steps=2)
    never = {"success_threshold": 2.0, "weighting": PassRate()}
    run.fit(module(qwen3, **never), data(train=Toys(), val=Toys()))
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 optimizer steps taken: " in shown and "no response of the last one was right" in shown
    assert "not held out: 12 are trained on" in shown and "held-out" not in shown


def test_each_validation_source_has_metrics_under_its_own_name(qwen3, tmp_path):
    run = trainer(tmp_path)
    run.validate(module(qwen3), data(val=[Toys(2), Counting(size=2)]), verbose=False)
    assert {name for name in run.callback_metrics if name.endswith("mean@2")} == {
        "val/mean@2",
        *("val/toys/mean@2", "val/toys/even/mean@2", "val/toys/odd/mean@2"),
        "val/counting/mean@2",
    }


def test_the_table_shows_percent_and_points():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(before_after_table({"mean@16": 0.25}, {"mean@16": 0.5, "x/mean@16": 1.0}))
    text = console.export_text()
    assert "25.0 -> 50.0 (+25.0)" in text and "100.0" in text
    console.file.close()
