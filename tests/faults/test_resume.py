"""What a run goes on from, what may have changed since, and what is said when it cannot."""

import json
import shutil

import pytest
import torch
from stopping import last, same_end, state


def error(folder):
    """What the last run in a folder said."""
    return (folder / "err").read_text()


def refusal(commands, folder, *args, command="fit"):
    """The one line of a run that is refused."""
    (folder / "err").unlink(missing_ok=True)
    assert commands.run(folder, *args, command=command) == 2, error(folder)
    said = error(folder)
    assert "Traceback" not in said
    *_, line = said.strip().splitlines()
    return line.removeprefix("scsdpo: error: ")


@pytest.fixture
def half(commands, tmp_path):
    """A run of four batches, in the midst of an epoch."""
    assert commands.run(tmp_path, "--trainer.max_steps=4") == 0, error(tmp_path)
    return tmp_path


@pytest.mark.parametrize("epochs", [-1, 2])
def test_max_steps_within_an_epoch_and_more_later_goes_on_with_the_next_question(
    epochs, commands, undisturbed, tmp_path
):
    limit = f"--trainer.max_epochs={epochs}"
    for steps in (4, 5, 8):  # three times: the table's "before" is still the first one's
        resume = [] if steps == 4 else ["--ckpt_path=last"]
        assert commands.run(tmp_path, limit, f"--trainer.max_steps={steps}", *resume) == 0
    same_end(tmp_path, undisturbed)
    newest = last(tmp_path).parents[1]
    table, expected = (
        json.loads((folder / "before_after.json").read_text())
        for folder in (newest, last(undisturbed).parents[1])
    )
    assert table == expected
    assert "Warning" not in error(tmp_path) and "pre-optimization" not in error(tmp_path)


def test_last_is_the_newest_whole_one_that_agrees(commands, half):
    first = last(half)
    assert commands.run(half, "--trainer.max_steps=2", "--seed_everything=1") == 0
    other = last(half)
    assert other != first
    torn = other.read_bytes()
    assert commands.run(half, "--trainer.max_steps=5", "--ckpt_path=last") == 0, error(half)
    assert f"from the checkpoint at {first.relative_to(half)}" in error(half)
    assert "trainer.max_steps: 4 -> 5: takes effect" in error(half)
    # Torn: passed over, and the one before it is taken.
    newest = last(half)
    newest.write_bytes(torn[: len(torn) // 2])
    assert commands.run(half, "--trainer.max_steps=6", "--ckpt_path=last") == 0
    assert f"checkpoint skipped: {newest.relative_to(half)} is incomplete" in error(half)
    line = refusal(commands, half, "--ckpt_path=last", "--data.seed=5")
    assert line.startswith(
        "ckpt_path: every checkpoint under runs/toys is of another configuration: "
    )
    assert f"{other.relative_to(half)} (seed_everything: 1 -> 0)" in line
    assert "data.seed: auto -> 5" in line


def test_last_without_any_is_refused(commands, tmp_path):
    line = refusal(commands, tmp_path, "--ckpt_path=last")
    assert line == (
        "ckpt_path: there is no complete checkpoint under runs/toys; leave --ckpt_path out to "
        "begin a new run"
    )


def test_what_takes_effect_does(commands, half):
    args = ["--model.optimizer=AdamW", "--model.optimizer.lr=3e-6", "--trainer.max_steps=6"]
    assert commands.run(half, "--ckpt_path", str(last(half)), *args) == 0, error(half)
    assert "model.optimizer.lr: 1e-05 -> 3e-06: takes effect" in error(half)
    assert state(last(half))["optimizer_states"][0]["param_groups"][0]["lr"] == 3e-6
    shown = (last(half).parents[1] / "config.yaml").read_text()
    assert "lr: 3.0e-06" in shown


def test_another_method_is_said_and_its_teacher_too(commands, half):
    args = ["--model.teacher=Frozen", "--model.teacher.context=PlainPrompt"]
    steps = "--trainer.max_steps=5"
    assert commands.run(half, "--ckpt_path", str(last(half)), *args, steps) == 0, error(half)
    assert "warning: model.teacher: EMA -> Frozen: results before and after" in error(half)
    back = ["--trainer.max_steps=6", "--ckpt_path", str(last(half))]
    assert commands.run(half, *back) == 0, error(half)
    assert "model.teacher is not in the checkpoint: it starts from the weights of" in error(half)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.policy.adapter=Lora"], "model.policy.adapter: FullFineTune -> Lora"),
        (["--model.policy.name_or_path=tiny"], "model.policy.name_or_path: "),
        (["--model.optimizer=SGD", "--model.optimizer.lr=1"], "model.optimizer: AdamW -> SGD"),
    ],
)
def test_what_cannot_change_is_refused_before_weights_are_loaded(args, said, commands, half):
    before = sorted(half.rglob("config.yaml"))
    line = refusal(commands, half, "--ckpt_path", str(last(half)), *args)
    assert line.startswith(said) and "cannot change after" in line
    assert "Loading weights" not in error(half)
    assert sorted(half.rglob("config.yaml")) == before


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_a_checkpoint_that_cannot_be_used_is_one_line(command, commands, half):
    path = half / "x.ckpt"

    def said(at=path):
        return refusal(commands, half, "--ckpt_path", str(at), command=command)

    whole = last(half).read_bytes()
    path.write_bytes(whole[:-100])
    assert said() == f"ckpt_path: {path} is incomplete: it was not written to its end"
    path.write_bytes(b"")
    assert said() == f"ckpt_path: {path} is incomplete: it was not written to its end"
    path.write_text("hello")
    assert said() == f"ckpt_path: {path} is not a checkpoint of `scsdpo fit`"
    torch.save({"weights": torch.zeros(2)}, path)
    assert said() == f"ckpt_path: {path} is not a checkpoint of `scsdpo fit`"
    assert said(half / "none") == f"ckpt_path: {half / 'none'} does not exist"
    assert said(half / "runs").startswith(f"ckpt_path: {half / 'runs'} is a folder; did you mean ")
    (half / "hf").mkdir()
    (half / "hf" / "config.json").write_text("{}")
    assert said(half / "hf").startswith(f"ckpt_path: {half / 'hf'} is an exported policy; name it")
    # Of another architecture under the same name.
    content = state(last(half))
    content["state_dict"]["policy.model.model.norm.weight"] = torch.zeros(3)
    torch.save(content, path)
    assert "the checkpoint does not fit this configuration: 1 of its tensors" in said()
    # A torn one beside a whole one.
    shutil.copy(last(half), half / "whole.ckpt")
    path.write_bytes(whole[:1000])
    assert said().endswith(f"; {half / 'whole.ckpt'} is complete")


def test_weights_only_can_be_measured_but_not_gone_on_from(commands, tmp_path):
    few = ["--trainer.max_steps=1", "--checkpoint.save_weights_only=true"]
    assert commands.run(tmp_path, *few) == 0
    saved = ["--ckpt_path", str(last(tmp_path))]
    assert "holds weights only" in refusal(commands, tmp_path, *saved)
    assert commands.run(tmp_path, *saved, command="validate") == 0, error(tmp_path)


def test_a_new_run_in_an_old_folder_sets_the_old_checkpoints_aside(commands, tmp_path):
    plain = ["--trainer.logger=false", "--trainer.default_root_dir=one", "--trainer.max_steps=2"]
    seeds = [[], ["--seed_everything=1"]]
    for seed in seeds:
        assert commands.run(tmp_path, *plain, *seed) == 0, error(tmp_path)
    folder = tmp_path / "one" / "checkpoints"
    assert state(folder / "last.ckpt")["config"]["seed_everything"] == 1
    assert state(folder / "last.1.ckpt")["config"]["seed_everything"] == 0
    # One that goes on does not: it is the same run.
    more = ["--trainer.max_steps=3", "--ckpt_path=last", *seeds[1]]
    assert commands.run(tmp_path, *plain[:2], *more) == 0, error(tmp_path)
    assert not (folder / "last.2.ckpt").exists()


def test_a_metric_that_nobody_logs_is_refused_before_weights_are_loaded(commands, tmp_path):
    best = ["--checkpoint.monitor=val/mean@16", "--checkpoint.save_top_k=1"]
    assert refusal(commands, tmp_path, *best) == (
        "checkpoint.monitor: val/mean@16 is never logged, because model.val_sampling.n is 2; did "
        "you mean val/mean@2?"
    )
    assert "Loading weights" not in error(tmp_path)


def test_a_bug_leaves_the_state_after_the_last_finished_batch(commands, undisturbed, tmp_path):
    assert commands.run(tmp_path, bug_at=5) == 99
    assert "the state after batch 4 is in" in error(tmp_path)
    assert commands.run(tmp_path, "--ckpt_path=last") == 0, error(tmp_path)
    same_end(tmp_path, undisturbed)
