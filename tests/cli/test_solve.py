"""`scsdpo solve`: one question, attempted and learned from until it is solved."""

import json
from pathlib import Path

import pytest

from test_configs import CONFIGS, scsdpo  # noqa: F401 - a fixture

TINY = CONFIGS / "tiny.yaml"
METHOD = CONFIGS / "methods" / "sdpo-solve.yaml"
COMMON = ("--model.optimizer.init_args.lr=1e-4", "--model.sampling.n=4")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")


def solve(scsdpo, out, *arguments, method=METHOD):  # noqa: F811
    given = ("--config", TINY, "--config", method, *COMMON, *QUIET, *arguments, "--out", out)
    assert scsdpo("solve", *given) in (0, None)
    lines = Path(out, "attempts.jsonl").read_text().splitlines()
    return json.loads(Path(out, "solution.json").read_text()), [*map(json.loads, lines)]


def test_attempts_end_with_the_first_right_one_and_the_policy_learns_between(scsdpo):  # noqa: F811
    found, attempts = solve(scsdpo, "a", "--question", "3", "--keep")
    assert found["solved"] and found["attempts"] == len(attempts) > 4
    assert [a["attempt"] for a in attempts] == list(range(1, len(attempts) + 1))
    assert [a["step"] for a in attempts] == [i // 4 for i in range(len(attempts))]
    assert [a["success"] for a in attempts] == [False] * (len(attempts) - 1) + [True]
    assert found["response"] == attempts[-1]["response"] and found["key"] == "lab/train/science/0/3"
    assert found["steps"] == (len(attempts) - 1) // 4
    # The same seed gives the same attempts, and the key names the same question as the place.
    again, same = solve(scsdpo, "b", "--question", found["key"])
    assert same == attempts
    assert again | {"seconds": 0} == found | {"seconds": 0}
    # What was learned decides the later attempts.
    frozen = "--model.optimizer.init_args.lr=1e-30"
    _, others = solve(scsdpo, "c", "--question", "3", "--attempts", str(len(attempts)), frozen)
    assert others[:4] == attempts[:4] and others != attempts
    # The policy that it became is a checkpoint like any other.
    assert scsdpo("export", "--ckpt", "a/policy.ckpt", "--out", "kept") in (0, None)
    assert Path("kept", "model.safetensors").exists()


def test_a_question_that_is_not_solved_ends_with_its_attempts(scsdpo, capsys):  # noqa: F811
    impossible = ("--model.success_threshold=2", "--question", "0")
    found, attempts = solve(scsdpo, "a", *impossible, "--attempts", "6")
    assert not found["solved"] and found["response"] == "" and found["answer"] is None
    assert found["attempts"] == len(attempts) == 6  # of the second batch two are not counted
    assert "not solved: 6 attempts, 1 optimizer steps" in capsys.readouterr().out


def test_without_credit_attempts_go_on_from_the_same_policy(scsdpo):  # noqa: F811
    grpo = CONFIGS / "methods" / "grpo.yaml"
    impossible = ("--model.success_threshold=2", "--question", "0", "--attempts", "12")
    found, attempts = solve(scsdpo, "a", *impossible, "--model.sampling.temperature=2", method=grpo)
    rewards = [a["reward"] for a in attempts]
    assert found["steps"] == 0 or len(set(rewards)) > 1
    assert len({a["response"] for a in attempts}) > 4  # each batch is drawn anew


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--question", "x"), "--question x: no question of data.val has this key"),
        (("--question", "300"), "--question 300: data.val has 256 questions, from 0"),
        (("--attempts", "0"), "--attempts must be >= 1, got 0"),
        (
            ("--model.selection=InformativePool", "--model.selection.questions=4"),
            "model.selection: InformativePool waits for several questions",
        ),
        (("--ckpt_path=x",), "ckpt_path: `scsdpo solve` runs a policy as it is loaded"),
    ],
)
def test_mistakes_end_in_one_line(arguments, says, scsdpo, capsys):  # noqa: F811
    assert scsdpo("solve", "--config", TINY, "--split", "val", *arguments, "--out", "a") == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1


def test_a_folder_that_holds_something_is_refused(scsdpo, capsys):  # noqa: F811
    Path("full").mkdir()
    Path("full", "mine.txt").write_text("mine")
    assert scsdpo("solve", "--config", TINY, "--out", "full") == 2
    assert "--out: full is not empty" in capsys.readouterr().err
