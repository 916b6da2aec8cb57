"""`scsdpo predict` writes a file, says where, and goes on after it was stopped."""

import json

import pytest
from pyarrow import parquet

from runs import Toys, data, module, trainer
from scsdpo.callbacks import PredictionWriter
from scsdpo.errors import ConfigurationError
from test_cli import scsdpo  # noqa: F401 - a fixture


def predict(folder, qwen3, writer, source=Toys(6), **settings):
    run = trainer(folder, callbacks=[writer])
    questions = data(val=source, val_questions_per_batch=2)
    model = module(qwen3, **settings)
    try:
        run.predict(model, questions, return_predictions=False)
    finally:
        model.train()  # strategies that are defaults belong to other tests' modules too


class Stopping(PredictionWriter):
    """Dies in the third batch, half of which it has written."""

    def write_on_batch_end(self, *args):
        if args[5] == 2:
            (part,) = self._parts()[-1:]
            with part.open("a") as file:
                file.write(json.dumps({"key": "toy/4", "sample": 0}) + '\n{"key": "toy/4", "sam')
            raise KeyboardInterrupt
        super().write_on_batch_end(*args)


def test_a_prediction_that_was_stopped_goes_on_and_equals_one_that_was_not(
    qwen3, tmp_path, monkeypatch
):
    whole, halves = tmp_path / "whole.jsonl", tmp_path / "halves.jsonl"
    predict(tmp_path, qwen3, PredictionWriter(str(whole)))
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    places = [(row["key"], row["sample"]) for row in rows]
    assert places == [(f"toy/{q}", i) for q in range(6) for i in range(2)]
    assert rows[2]["question"] == "1?" and rows[0]["gold"] == ""

    with pytest.raises(SystemExit):
        predict(tmp_path, qwen3, Stopping(str(halves)))
    assert not halves.exists()
    from scsdpo.training.collector import Collector

    asked, sample = [], Collector.sample

    def spy(self, module, policy, prompts, sampling):
        asked.extend(prompt.key for prompt in prompts)
        return sample(self, module, policy, prompts, sampling)

    monkeypatch.setattr(Collector, "sample", spy)
    predict(tmp_path, qwen3, PredictionWriter(str(halves)))
    assert asked == ["toy/4", "toy/5"]
    assert halves.read_bytes() == whole.read_bytes()
    left = {path.name for path in tmp_path.glob("*.jsonl*")}
    assert left == {f"{n}.jsonl{end}" for n in ("whole", "halves") for end in ("", ".about.json")}
    with pytest.raises(ConfigurationError, match="exists and is complete; move it"):
        predict(tmp_path, qwen3, PredictionWriter(str(halves)))


class Twins(Toys):
    """Questions 0, 1, 2, 0, 1, 2."""

    def __getitem__(self, index):
        return super().__getitem__(index % 3)


def test_copies_of_a_question_are_told_apart_also_after_a_stop(qwen3, tmp_path):
    whole, halves = tmp_path / "whole.jsonl", tmp_path / "halves.jsonl"
    predict(tmp_path, qwen3, PredictionWriter(str(whole)), Twins(6))
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    places = [(row["key"], row["sample"]) for row in rows]
    assert places == [
        (f"toy/{q}", 2 * copy + i) for copy in (0, 1) for q in range(3) for i in (0, 1)
    ]
    # The second copy of question 0 is done, and the first one is not.
    about = tmp_path / "whole.jsonl.about.json"
    (tmp_path / "halves.jsonl.about.json").write_text(about.read_text())
    (tmp_path / "halves.jsonl.part-1").write_text(
        "".join(json.dumps(row) + "\n" for row in rows[6:8])
    )
    predict(tmp_path, qwen3, PredictionWriter(str(halves)), Twins(6))
    assert halves.read_bytes() == whole.read_bytes()


def test_what_was_begun_otherwise_is_not_gone_on_with(qwen3, tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(SystemExit):
        predict(tmp_path, qwen3, Stopping(str(path)))
    with pytest.raises(ConfigurationError, match=r"success_threshold = 1\.0, now 0"):
        predict(tmp_path, qwen3, PredictionWriter(str(path)), success_threshold=0.7)


def test_the_command_writes_jsonl_by_default_or_parquet_and_says_where(scsdpo, tmp_path):  # noqa: F811
    code, shown, error = scsdpo("predict")
    assert code == 0, error
    path = tmp_path / shown.strip().rpartition(": ")[2]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert shown.startswith("4 responses") and len(rows) == 2 * 2
    assert scsdpo("predict", "--out=deep/x.parquet")[0] == 0
    assert parquet.read_table(tmp_path / "deep" / "x.parquet").to_pylist() == rows
