"""What cannot work in a run is refused before its weights are loaded; what ends it is said."""

import logging
import re

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler

from coins import Always
from runs import Toys, data, module, trainer
from scsdpo.checkpoints import Checkpoint
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.training import run_checks
from scsdpo.training.warmup import Warmup


def refused(folder, tmp_path, settings, monkeypatch, questions=None, **strategies):
    """What a run of three batches an epoch says instead of loading its weights."""
    monkeypatch.setattr(CausalLM, "configure_model", lambda *_, **__: pytest.fail("loads"))
    with pytest.raises(ConfigurationError) as caught:
        run = module(folder, **strategies)
        trainer(tmp_path, **settings).fit(run, questions or data())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"accumulate_grad_batches": 2},
            "trainer.accumulate_grad_batches: .*data.questions_per_batch",
        ),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val: .* model.limits.max_grad_norm"),
        (
            {"gradient_clip_algorithm": "value"},
            "trainer.gradient_clip_algorithm: value would have no",
        ),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: must be >= 1, got 0"),
        ({"num_sanity_val_steps": -2}, "trainer.num_sanity_val_steps: must be >= -1"),
        ({"precision": "bf16-true"}, "trainer.precision: must be 32-true or bf16-mixed, got bf16"),
        ({"precision": "64-true"}, "trainer.precision: must be 32-true or bf16-mixed, got 64-true"),
        (
            {"val_check_interval": 4},
            "trainer.val_check_interval: is 4 batches, but an epoch has 3: set "
            "trainer.check_val_every_n_epoch: null",
        ),
        (
            {"val_check_interval": 2, "limit_train_batches": 1},
            "is 2 batches, but an epoch has 1: .*trainer.val_check_interval to 1 or less",
        ),
        ({"limit_train_batches": 0.1}, "trainer.limit_train_batches: 0.1 of 3 batches is less"),
        ({"limit_val_batches": 0.5}, "trainer.limit_val_batches: 0.5 of 1 batch is less than one"),
    ],
)
def test_settings_that_fail_late_are_refused_early(settings, said, qwen3, tmp_path, monkeypatch):
    assert re.search(said, refused(qwen3, tmp_path, settings, monkeypatch))


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (callbacks.StochasticWeightAveraging(0.1), "StochasticWeightAveraging needs Lightning's"),
        (callbacks.GradientAccumulationScheduler({0: 2}), "remove it"),
        (callbacks.LearningRateFinder(), "remove it"),
        (callbacks.BatchSizeFinder(), "remove it"),
        (callbacks.ModelPruning("l1_unstructured"), "remove it"),
        (callbacks.BackboneFinetuning(), "remove it"),
        (SpikeDetection(), "remove it"),
        (callbacks.LearningRateMonitor(), "LearningRateMonitor needs a logger"),
        (callbacks.DeviceStatsMonitor(), "DeviceStatsMonitor needs a logger"),
        (
            callbacks.EarlyStopping("val/acc"),
            "EarlyStopping.monitor: val/acc is never logged; did you",
        ),
        (callbacks.EarlyStopping("val/mean@16"), "did you mean val/mean@2?"),
        (callbacks.EarlyStopping("train/los"), "did you mean train/loss?"),
        (
            callbacks.EarlyStopping("val/odder/mean@2"),
            r"of category 'odder' \(categories: even, odd\)",
        ),
        (
            callbacks.ModelCheckpoint(monitor="val/maj@8"),
            "ModelCheckpoint.monitor: val/maj@8 is never logged",
        ),
        (Checkpoint(monitor="val/accuracy"), "^checkpoint.monitor: val/accuracy is never logged"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_callbacks_that_fail_late_are_refused_early(callback, said, qwen3, tmp_path, monkeypatch):
    saves = isinstance(callback, callbacks.ModelCheckpoint)
    settings = {"callbacks": [callback], "enable_checkpointing": saves}
    assert re.search(said, refused(qwen3, tmp_path, settings, monkeypatch))


@pytest.mark.parametrize("questions", [{"val": []}, {}])
def test_a_figure_of_validation_needs_one(questions, qwen3, tmp_path, monkeypatch):
    settings = {"callbacks": [callbacks.EarlyStopping("val/mean@2")]}
    settings |= {} if questions else {"limit_val_batches": 0}
    given = data(Toys())
    given.val_sources = questions.get("val", given.val_sources)
    said = refused(qwen3, tmp_path, settings, monkeypatch, given)
    assert "val/mean@2 is logged by validation, but there is none" in said


class Unfinished(torch.optim.Optimizer):
    """Raises what is no mistake of the user's kind."""

    def __init__(self, parameters):
        raise KeyError("lr")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: torch.optim.LBFGS(p), "model.optimizer: LBFGS cannot take a step .*closure"),
        (lambda p: torch.optim.SparseAdam(list(p)), "SparseAdam cannot take a step .*dense"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "AdamW cannot take a step"),
        (lambda p: torch.optim.AdamW(p, fused=True, foreach=True), "model.optimizer: `fused` and"),
        (Unfinished, "model.optimizer: 'lr'"),
    ],
)
def test_an_optimizer_that_cannot_step_is_refused(make, said, qwen3, tmp_path, monkeypatch):
    assert re.search(said, refused(qwen3, tmp_path, {}, monkeypatch, optimizer=make))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=5),
            "OneCycleLR fails at optimizer step 6 of the run's 6: .*; choose arguments for so many "
            "steps, or shorten the run",
        ),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=0), "fails at optimizer step 1 of"),
        (lambda o: lr_scheduler.StepLR(o, step_size=0), "model.lr_scheduler: StepLR fails at opt"),
        (
            lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 - step / 3),
            "LambdaLR makes the learning rate -0.000333333 at optimizer step 4 of the run's 6",
        ),
        (lambda o: lr_scheduler.ExponentialLR(o, gamma=1e200), "the learning rate inf at"),
        (lambda o: lr_scheduler.LRScheduler(o), "model.lr_scheduler: NotImplementedError"),
        (
            lambda o: lr_scheduler.ReduceLROnPlateau(o),
            "write lightning.pytorch.cli.ReduceLROnPlateau with .*monitor: val/mean@2",
        ),
        (
            lambda o: ReduceLROnPlateau(o, monitor="val/mean@3"),
            "model.lr_scheduler.monitor: val/mean@3 is never logged, .* did you mean val/mean@2",
        ),
    ],
)
def test_a_schedule_is_gone_through_to_the_end_of_the_run(make, said, qwen3, tmp_path, monkeypatch):
    found = refused(qwen3, tmp_path, {"max_epochs": 2}, monkeypatch, lr_scheduler=make)
    assert re.search(said, found), found


def test_a_schedule_that_just_lasts_and_figures_that_are_logged_are_taken(qwen3, tmp_path):
    run = module(qwen3, lr_scheduler=lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=3))
    own = [callbacks.EarlyStopping("train/divergence"), callbacks.LearningRateMonitor()]
    given = trainer(tmp_path, callbacks=own, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    given.fit(run, data())
    assert given.global_step == 3
    # Whatever was logged can be monitored.
    assert len(given.callback_metrics) > 30
    for name in (name for name in given.callback_metrics if "/" in name):  # or a callback's
        run_checks._check_name("key", name, given, run)
    with pytest.raises(ConfigurationError, match="train/nothing is never logged"):
        run_checks._check_name("key", "train/nothing", given, run)


class Counting(callbacks.Callback):
    """Of the user's: may log anything."""


def test_what_a_class_of_the_user_s_may_log_is_left_to_it(qwen3, tmp_path):
    own = [Counting(), callbacks.EarlyStopping("val/mine", strict=False)]
    given = trainer(tmp_path, callbacks=own, limit_train_batches=1)
    given.fit(module(qwen3), data())
    assert given.global_step == 1


class FailsAtThree(lr_scheduler.LRScheduler):
    """Lasts on one small matrix, and not on the policy's."""

    def get_lr(self):
        if self.last_epoch == 3 and len(self.optimizer.param_groups[0]["params"]) > 1:
            raise RuntimeError("no third step")
        return [group["lr"] for group in self.optimizer.param_groups]


def test_a_schedule_that_fails_all_the_same_leaves_a_whole_state(qwen3, tmp_path):
    saver = Checkpoint(dirpath=tmp_path / "kept", save_last=True, save_top_k=0, every_minutes=999.0)
    run = module(qwen3, lr_scheduler=FailsAtThree)
    given = trainer(tmp_path, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(TrainingStopped, match="FailsAtThree: no third step"):
        given.fit(run, data(val=Toys(4)))
    saved = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    own = run.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in saved["state_dict"].items())


def test_a_plateau_is_stepped_after_each_validation_and_goes_on_where_it_was(qwen3, tmp_path):
    """The figure stays 1: the first validation is the best, and each later one halves the rate."""

    def fitted(epochs, **checkpoint):
        run = module(
            qwen3,
            lr_scheduler=lambda o: ReduceLROnPlateau(
                o, monitor="val/mean@2", mode="max", factor=0.5, patience=0
            ),
        )
        folder = tmp_path / f"{epochs}{bool(checkpoint)}"
        saver = Checkpoint(dirpath=folder, save_last=True, save_top_k=0)
        given = trainer(folder, max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
        given.fit(run, data(Toys(4), Toys(1, Always())), **checkpoint)
        return folder / "last.ckpt", given.optimizers[0].param_groups[0]["lr"]

    two, rate = fitted(2)
    assert rate == 1e-3 * 0.5
    assert fitted(4)[1] == 1e-3 * 0.5**3
    assert fitted(4, ckpt_path=two)[1] == 1e-3 * 0.5**3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"max_epochs": 1, "max_steps": 10},
            [
                "trainer.max_epochs: 1 ends the run after 3 batches (3 per epoch) and at most 3 "
                "optimizer steps, before trainer.max_steps: 10; set trainer.max_epochs: -1 if "
                "max_steps alone shall end it",
                "ended by trainer.max_epochs: 1, after 3 batches and 3 optimizer steps "
                "(trainer.max_steps: 10 not reached)",
            ],
        ),
        (
            {"max_epochs": 2, "max_steps": 1},
            [
                "there will be no validation: the first is due after batch 3, but the run ends "
                "after 1; lower trainer.val_check_interval or check_val_every_n_epoch",
                "ended by trainer.max_steps: 1, after 1 batch and 1 optimizer step "
                "(trainer.max_epochs: 2 not reached)",
            ],
        ),
        (
            {"max_epochs": -1, "max_steps": 3},
            ["ended by trainer.max_steps: 3, after 3 batches and 3 optimizer steps"],
        ),
        (
            {"max_epochs": 9, "max_time": {"milliseconds": 10}},
            ["ended by trainer.max_time, after 1 batch and 1 optimizer step"],
        ),
        (
            {
                "max_epochs": 9,
                "callbacks": [callbacks.EarlyStopping("train/solve_all", patience=1)],
            },
            ["ended by EarlyStopping: Monitored metric train/solve_all did not improve"],
        ),
    ],
)
def test_the_limit_that_ends_a_run_is_named(settings, said, qwen3, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, **settings).fit(module(qwen3), data())
    lines = [m for m in caplog.messages if m.startswith(("trainer.max", "ended by", "there will"))]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines


@pytest.mark.parametrize(
    ("every", "epochs", "steps", "named"),
    [
        (4, None, 6, "3"),
        (9, None, 6, "6"),
        (3, None, 6, ""),
        (2, None, 6, ""),
        (2, 1, 1, "1"),
        (1.0, 1, 3, ""),  # an epoch has three batches
        (1.0, 1, 6, ""),
        (1.0, 1, 4, "2 and trainer.check_val_every_n_epoch to null"),
        (1.0, 2, 3, "3 and trainer.check_val_every_n_epoch to null"),
        (1.0, 2, 6, ""),
    ],
)
def test_a_warm_up_without_a_validation_at_its_end_is_told_which_interval_has_one(
    every, epochs, steps, named, qwen3, tmp_path, caplog
):
    run = module(qwen3, warmup=Warmup(steps=steps, questions=1))
    options = {"val_check_interval": every, "check_val_every_n_epoch": epochs, "max_steps": 1}
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_epochs=-1, **options).fit(run, data())
    lines = [line for line in caplog.messages if line.startswith("no validation falls")]
    assert [line.partition("interval to ")[2] for line in lines] == ([named] if named else [])
