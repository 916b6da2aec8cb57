"""`scsdpo validate` and `test`: figures with intervals, on any policy, as a table and a file."""

import json
import math

import pytest

from runs import Toys, data, module, trainer
from scsdpo.evaluation import EvaluatedQuestion, Result, figures, means
from scsdpo.statistics import score_interval
from scsdpo.training import FOLDER
from test_cli import scsdpo  # noqa: F401 - a fixture


def question(key="q/0", category="", rewards=(1.0, 0.0, 0.0, 0.0), **settings):
    k = len(rewards)
    defaults = {
        "question": "1 + 1?",
        "gold": "2",
        "successes": tuple(reward >= 0.5 for reward in rewards),
        "answers": tuple("2" if reward >= 0.5 else f"w{i}" for i, reward in enumerate(rewards)),
        "lengths": (4,) * k,
        "finished": (True,) * k,
        "errors": 0,
        "response": "2",
    }
    return EvaluatedQuestion(key=key, category=category, rewards=rewards, **(defaults | settings))


def test_the_scores_of_a_question_have_their_closed_forms():
    scores = question(answers=("2", "3", "3", None), finished=(True, True, True, False)).scores()
    assert scores["mean@4"] == scores["pass@1"] == 1 / 4 and scores["maj@4"] == 0
    assert scores["pass@2"] == 1 / 2 and scores["pass@4"] == 1
    assert scores["well_formed"] == 3 / 4 and scores["truncated"] == 1 / 4
    assert scores["response_length"] == 4


def test_figures_are_means_over_questions_by_source_category_and_part():
    rows = [
        question("a", "math/level1", (1.0, 1.0)),
        question("b", "math/level2", (0.0, 0.0)),
        question("c", "tools", (1.0, 0.0)),
    ]
    found = figures(rows)
    assert list(found) == ["", "math", "math/level1", "math/level2", "tools"]
    assert found["math"]["mean@2"] == score_interval([1, 0])
    assert found[""]["response_length"].value == 4
    assert math.isnan(found[""]["response_length"].low)  # all alike: others are not known
    assert means(rows)["math/mean@2"] == 0.5 and means(rows)["maj@2"] == 0.5
    assert set(figures([question(category="one"), question("x", "one")])) == {""}
    assert figures([question(rewards=(2.0, 3.0))] * 2)[""]["mean@2"].value == 2.5  # no share


def test_a_result_is_read_as_it_was_written_and_nothing_else_is(tmp_path):
    path = tmp_path / "deep" / "result.json"
    result = Result(about={"policy": "p"}, questions=[question(answers=("é", None, "x", "x"))])
    result.write(path)
    assert Result.read(path) == result
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1 and content["figures"]["all"]["mean@4"]["n"] == 1
    assert content["figures"]["all"]["mean@4"]["low"] is None  # one question tells nothing
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    for broken in ("", "{}", "[]", json.dumps(content | {"schema_version": 2})):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"result\.json"):
            Result.read(path)


def test_each_validation_of_a_run_is_a_file_and_a_new_run_sets_the_old_ones_aside(qwen3, tmp_path):
    for _ in range(2):
        run = trainer(tmp_path, num_sanity_val_steps=-1, val_check_interval=2, max_steps=4)
        run.fit(module(qwen3), data(Toys(16)))
        written = {path.name for path in (tmp_path / FOLDER).iterdir()}
        assert {"val-0.json", "val-2.json"} <= written
        last = Result.read(tmp_path / FOLDER / f"val-{max(written)[4:-5]}.json")
        assert [q.key for q in last.questions] == [f"toy/{i}" for i in range(4)]
        shown = {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("val/")}
        logged = {f"val/{k}": pytest.approx(v, abs=1e-6) for k, v in means(last.questions).items()}
        assert shown == logged
    assert (tmp_path / f"{FOLDER}.1" / "val-0.json").exists()


def test_a_policy_is_validated_by_itself_and_a_checkpoint_with_its_runs_configuration(
    scsdpo,  # noqa: F811
    qwen3,
    tmp_path,
):
    """The checkpoint, without any other option, repeats the run's last validation."""
    own = ["--data.train=runs.Toys", "--data.val=runs.Toys", "--data.val.size=2"]
    own += ["--model.val_sampling={n: 3, max_new_tokens: 2}", "--trainer.accelerator=cpu"]
    code, shown, _ = scsdpo("validate", f"--policy={qwen3}", *own, base=[])
    assert code == 0 and "mean@3" in shown and "pass@2" in shown
    path = tmp_path / shown.strip().splitlines()[-1].rpartition(": ")[2]
    result = Result.read(path)
    assert len(result.questions) == 2 and result.about["sampling"]["n"] == 3
    assert result.about["split"] == "val" and path.parent == tmp_path / "runs" / FOLDER
    assert not (tmp_path / "runs" / "config.yaml").exists()

    assert scsdpo("fit")[0] == 0
    (last,) = (tmp_path / "runs" / FOLDER).glob("val-2.json")
    options = ("--policy=runs", "--trainer.accelerator=cpu", "--out=again.json")
    assert scsdpo("test", *options, base=[])[0] == 0
    again = Result.read(tmp_path / "again.json")
    assert again.about["split"] == "test" and again.about["step"] == 3
    assert [q.key for q in again.questions] == [q.key for q in Result.read(last).questions]
    assert again.about["batch"] == 3 and "last.ckpt" in again.about["checkpoint"]


def test_demonstrations_show_the_policys_own_response_and_one_to_another_question(
    scsdpo,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    from scsdpo.training.collector import Collector

    asked = []
    sample = Collector.sample

    def spy(self, module, policy, prompts, sampling):
        asked.append([prompt.messages[-1]["content"] for prompt in prompts])
        return sample(self, module, policy, prompts, sampling)

    monkeypatch.setattr(Collector, "sample", spy)
    options = ["--demonstrations", "--data.val.verifier=runs.Always", "--out=out.json"]
    code, shown, error = scsdpo("validate", "--data.val.size=3", *options)
    assert code == 0, error
    assert "gain by its own" in shown
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["demonstrations"]["questions"] == 3
    assert content["demonstrations"]["own_gain"]["value"] == 0  # all are right, with or without
    texts = [q["response"] for q in content["questions"]]
    for place in range(3):
        own, another = asked[1][place], asked[2][place]
        assert own.startswith(f"{place}?") and another.startswith(f"{place}?")
        assert f"solution:\n\n{texts[place]}\n\n" in own
        assert f"solution:\n\n{texts[(place + 1) % 3]}\n\n" in another
    never = "--data.val.verifier={class_path: runs.Always, init_args: {reward: 0.0}}"
    code, _, error = scsdpo("validate", "--demonstrations", never)
    assert code == 2 and "--demonstrations: 0 of 2 questions were solved" in error
