"""What is not finite is named for what it is, and never the only state on disk."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor

import scsdpo
from runs import Always, Toys, data, module, trainer
from scsdpo.advantage import GroupRelative
from scsdpo.checkpoints import LAST, Checkpoint
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.teacher import NoTeacher
from scsdpo.training import Limits
from scsdpo.training.on_failure import newest_checkpoint
from scsdpo.types import Sampling


class At(Callback):
    """Does something to the module at the start of its third batch."""

    def __init__(self, act):
        self.act = act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            with torch.no_grad():
                self.act(pl_module)


def fit(model, root, act=lambda module: None, **settings):
    """A run that saves each step as `step=N.ckpt`; the trainer."""
    each = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True}
    saved = Checkpoint(math.inf, dirpath=root / "checkpoints", filename="{step}", **each)
    callbacks = [saved, At(act)]
    run = trainer(root, enable_checkpointing=True, callbacks=callbacks, **settings)
    model.trainer = run
    return run, lambda: run.fit(model, data(Toys(20)))


def finite(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return all(t.isfinite().all() for t in state.values() if isinstance(t, Tensor))


def poison(part, value):
    def act(module):
        next(module.get_submodule(part).parameters()).fill_(value)

    return act


@pytest.mark.parametrize(
    "value, said",
    [(torch.nan, "the policy's weights are not finite: 1 of"), (1e30, "the policy's weights are")],
)
def test_policy_weights_are_named_and_nothing_of_them_is_saved(qwen3, tmp_path, value, said):
    run, go = fit(module(qwen3), tmp_path, poison("policy", value))
    with pytest.raises(TrainingStopped, match=said):
        go()
    newest = newest_checkpoint(run)
    assert newest.name == "step=2.ckpt" and finite(newest)
    assert not (tmp_path / "checkpoints" / LAST).exists()


def test_a_teacher_is_named_and_nothing_of_it_is_saved(qwen3, tmp_path, capfd):
    run, go = fit(module(qwen3), tmp_path, poison("teacher", torch.nan))
    with pytest.raises(TrainingStopped, match="the teacher's weights are not finite: 1 of"):
        go()
    assert newest_checkpoint(run).name == "step=2.ckpt"
    assert "could not be saved: the teacher's weights are not finite" in capfd.readouterr().err


def test_weights_that_are_not_finite_are_refused_at_the_start(qwen3, tmp_path):
    model = module(qwen3)
    model.configure_model()
    with torch.no_grad():
        next(model.policy.parameters())[0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match=r"model\.policy: the policy's weights are not"):
        fit(model, tmp_path)[1]()


def test_a_step_that_destroys_the_weights_is_the_last(qwen3, tmp_path):
    lr = partial(torch.optim.AdamW, lr=1e30)
    run, go = fit(module(qwen3, optimizer=lr), tmp_path)
    with pytest.raises(TrainingStopped, match=r"from a norm of .* lower learning rate than 1e\+30"):
        go()
    assert newest_checkpoint(run) is None  # the first step did it, and it was not saved


def test_a_run_of_bad_steps_saves_the_weights_before_the_first_of_them(qwen3, tmp_path, capfd):
    settings = {"advantage": GroupRelative(), "teacher": NoTeacher()}
    model = module(qwen3, **settings, limits=Limits(max_bad_steps=2))

    def act(module):
        backward = module.manual_backward
        module.manual_backward = lambda loss: backward(loss * torch.inf)

    _, go = fit(model, tmp_path, act)
    with (
        pytest.warns(UserWarning, match="step skipped, .* is not finite: the gradient alone"),
        pytest.raises(TrainingStopped, match="2 steps in a row were not finite"),
    ):
        go()
    path = tmp_path / "checkpoints" / LAST
    assert finite(path)
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert f"the state after batch 3 is in {path}" in capfd.readouterr().err


def test_logits_that_overflow_are_named(qwen3, tmp_path):
    """Every weight is finite, and a product of three of them is not."""

    def act(module):
        for layer in module.policy.language_model.get_decoder().layers:
            for parameter in layer.mlp.parameters():
                parameter.fill_(1e14)

    _, go = fit(module(qwen3), tmp_path, act)
    with pytest.raises(TrainingStopped, match="nothing can be sampled: the policy's logits are"):
        go()
    assert finite(tmp_path / "checkpoints" / LAST)


def test_a_checkpoint_is_not_written_over_with_weights_that_are_not_finite(qwen3, tmp_path):
    model = module(qwen3)
    run = trainer(tmp_path)
    run.fit(model, data())
    good = tmp_path / "good.ckpt"
    run.save_checkpoint(good)
    before = good.read_bytes()
    with torch.no_grad():
        poison("teacher", torch.inf)(model)
    with pytest.raises(
        TrainingStopped, match=r"the teacher's weights are not .* no checkpoint is saved"
    ):
        run.save_checkpoint(good)
    assert good.read_bytes() == before


def test_batches_that_teach_nothing_are_said_long_before_the_run_stops(qwen3, tmp_path):
    """Noise shows: the mean log-prob is that of a uniform draw from 264 tokens, ln 264 = 5.58."""
    noise = Sampling(n=4, max_new_tokens=8, temperature=100)
    model = module(qwen3, sampling=noise)
    said = r"10 batches in a row .* is -5\.5\d; a policy that samples noise has -5\.58"
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path).fit(model, data(Toys(44, verifier=Always(0.0))))


def test_a_temperature_of_noise_is_refused():
    with pytest.raises(ValueError, match=r"Sampling\(temperature=...\)` must be > 0 and <= 100"):
        Sampling(temperature=1e8)


def test_the_command_says_it_in_one_line_and_exits_with_3(tmp_path):
    """lr 1e30 on the tiny policy, as a user meets it."""
    command = [sys.executable, "-m", "scsdpo", "fit", "--config", "configs/tiny.yaml"]
    command += [f"--trainer.logger.save_dir={tmp_path}", "--model.optimizer.lr=1e30"]
    command += ["--trainer.num_sanity_val_steps=0", "--model.lr_scheduler.start_factor=1.0"]
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(scsdpo.__file__).parents[1])
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("scsdpo: error: an optimizer's step took the policy's weights from")
    assert not list(tmp_path.rglob("*.ckpt"))
