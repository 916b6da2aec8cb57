"""What a run leaves behind: every batch once, whatever happened on the way."""

import json
import math

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from runs import Always, Toys, data, module, trainer
from scsdpo.callbacks import RolloutCallback
from scsdpo.records import JsonLines, run_folder

FLEETING = ("time", "train/seconds/", "train/memory")
"""Keys whose values differ between two runs of the same numbers."""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lasting(records):
    return [{k: v for k, v in record.items() if not k.startswith(FLEETING)} for record in records]


def test_lines_are_appended_extended_and_cut(tmp_path):
    file = JsonLines(tmp_path / "new" / "x.jsonl")
    assert file.last == {}
    for number in range(4):
        file.append({"batch": number, "odd": math.nan, "far": [math.inf, 1.5]})
    file.extend({"val": 1.25, "odd": 2})
    assert file.last == lines(file.path)[-1]
    assert file.last == {"batch": 3, "odd": 2, "far": [None, 1.5], "val": 1.25}
    file.extend({"val": 0})  # a shorter line than before
    assert len(lines(file.path)) == 4 and file.last["val"] == 0
    with file.path.open("a") as torn:
        torn.write('{"batch": 4, "od')  # a write that was killed
    file.cut(9)
    assert [line["batch"] for line in lines(file.path)] == [0, 1, 2, 3]
    file.cut(1)
    file.append({"batch": 7})
    assert [line["batch"] for line in lines(file.path)] == [0, 1, 7]


def test_another_runs_file_is_set_aside(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    for content in ("first", "second"):
        file.begin(0, None)
        file.append({"run": content})
    file.begin(0, None)
    kept = {path.name: lines(path)[0]["run"] for path in tmp_path.iterdir()}
    assert kept == {"x.1.jsonl": "first", "x.2.jsonl": "second"}


def test_every_batch_is_a_line_with_every_figure_that_was_logged(qwen3, tmp_path):
    run = trainer(tmp_path, num_sanity_val_steps=-1, val_check_interval=2)
    model = module(qwen3)
    run.fit(model, data(Toys(16)))
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["batch"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in records][-1] == run.global_step
    start, *rest = records
    assert "val/mean@2" in start and not any(key.startswith("train/") for key in start)
    assert ["val/mean@2" in record for record in rest] == [False, True, False, True]
    for record in rest:
        assert {"train/pass_rate", "train/seconds/rollout", "train/tokens/rollout"} <= {*record}
    for name, value in run.callback_metrics.items():
        assert records[-1][name] == pytest.approx(float(value), nan_ok=True), name


def test_a_batch_without_a_step_has_a_line_without_figures_of_a_step(qwen3, tmp_path):
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(module(qwen3), data(Toys(verifier=Always(1.0))))
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 0, 0]
    assert all("train/loss" not in record for record in records)
    assert [record["train/skipped"] for record in records] == [1, 2, 3]


class SaveAt(L.Callback):
    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


def responses(folder):
    """Files of responses and tokens, but for the name of the run."""
    return {
        path.name: [record | {"run": ""} for record in lines(path)]
        for name in ("tokens", "rollouts")
        for path in sorted((folder / name).iterdir())
    }


def evaluated(folder):
    """Questions of each validation."""
    paths = (folder / "evaluations").iterdir()
    return {path.name: json.loads(path.read_text())["questions"] for path in paths}


def logger(tmp_path, version):
    return TensorBoardLogger(tmp_path, name="run", version=version)


@pytest.mark.parametrize("version", ["same", "other"])
def test_after_a_resume_every_batch_is_there_once(qwen3, tmp_path, version):
    def fit(folder, **settings):
        log = {"logger": logger(tmp_path, folder), "log_every_n_steps": 1}
        made = trainer(tmp_path, val_check_interval=2, **log)
        made.callbacks.append(SaveAt(tmp_path / "run" / folder / "checkpoints" / "x.ckpt", 4))
        made.fit(module(qwen3), data(Toys(24)), **settings)
        return tmp_path / "run" / folder / "metrics.jsonl"

    first = fit("same")
    whole, kept = lines(first), responses(first.parent)
    assert [record["batch"] for record in whole] == [1, 2, 3, 4, 5, 6]
    assert [name for name in kept if name.startswith("val")] == [
        f"val_00000{batch}.jsonl" for batch in (2, 4, 6)
    ]
    evaluations = evaluated(first.parent)
    assert evaluations.keys() == {"val-2.json", "val-4.json", "val-6.json"}
    again = fit(version, ckpt_path=tmp_path / "run" / "same" / "checkpoints" / "x.ckpt")
    assert lasting(lines(again)) == lasting(whole)
    assert responses(again.parent) == kept
    assert evaluated(again.parent) == evaluations


def test_a_new_run_in_an_old_folder_keeps_the_old_record(qwen3, tmp_path):
    for _ in range(2):
        trainer(tmp_path, limit_val_batches=0).fit(module(qwen3), data())
    assert lasting(lines(tmp_path / "metrics.1.jsonl")) == lasting(
        lines(tmp_path / "metrics.jsonl")
    )


def test_the_folder_is_the_one_of_the_checkpoints(tmp_path):
    board = TensorBoardLogger(tmp_path, name="a", version=3)
    assert run_folder(trainer(tmp_path, logger=board)) == tmp_path / "a" / "version_3"
    named = CSVLogger(tmp_path, name="a", version="mine")
    assert run_folder(trainer(tmp_path, logger=named)) == tmp_path / "a" / "mine"
    assert run_folder(trainer(tmp_path)) == tmp_path


class Diversity(RolloutCallback):
    """The example of its docstring."""

    def __init__(self):
        self.seen, self.weights = [], []

    def on_rollouts(self, trainer, module, judged):
        self.seen.append(judged.split)
        if judged.split == "train":
            distinct = [len(set(group)) / len(group) for group in judged.texts]
            module.log("train/distinct", sum(distinct) / len(distinct), sync_dist=True)

    def on_batch(self, trainer, module, batch):
        self.weights.append(batch.weights)


def test_a_callback_sees_rollouts_verdicts_and_weights_and_its_figure_is_recorded(qwen3, tmp_path):
    callback = Diversity()
    model = module(qwen3)
    trainer(tmp_path, callbacks=[callback]).fit(model, data())
    assert callback.seen == ["train", "train", "train", "val"]
    assert len(callback.weights) == 3
    weights = callback.weights[0]
    assert weights.shape == (4, 4) and not bool((weights == 1).all())
    assert all(0 < record["train/distinct"] <= 1 for record in lines(tmp_path / "metrics.jsonl"))
