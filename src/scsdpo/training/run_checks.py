"""What of a run's settings cannot work, said before any weight is loaded.

Lightning and torch take most of it, and fail at the first step, validation or end of an epoch.
"""

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau as PlateauWithoutMonitor

from scsdpo.checkpoints import Checkpoint
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError, first_line
from scsdpo.metrics.training import PHASES, SHOWN_TURNS
from scsdpo.policy import Unquantized
from scsdpo.policy.quantization import IN_SHARDS

T = TypeVar("T")

_PRECISIONS = ("32-true", "bf16-mixed")
_NEED_AUTOMATIC = (
    *(BackboneFinetuning, BaseFinetuning, BatchSizeFinder, GradientAccumulationScheduler),
    *(LearningRateFinder, ModelPruning, SpikeDetection, StochasticWeightAveraging),
)
"""They rely on Lightning's automatic optimization, or on a loss that `training_step` returns."""
_NEED_LOGGER = (DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor)
_OURS = ("scsdpo.", "lightning.", "pytorch_lightning.")
"""Packages whose modules and callbacks log nothing but what is listed here."""
_ACCURACY = re.compile(r"(val/(?:(.+)/)?(?:mean|maj))@(\d+)")
_TRAIN = (
    *("pass_rate", "solve_none", "solve_all", "informative", "medium", "central", "reward"),
    *("response_length", "truncated", "effective_questions", "verifier_errors", "loss"),
    *("gradient_norm", "entropy", "importance_capped", "logprob_gap", "logprob_gap_max"),
    *("age_steps", "age_steps_max", "age_batches", "age_batches_max", "other_versions"),
    *("logprob_drift", "importance_ess", "ratio_ess", "asked_again"),
    *("logprob_gap_share", "trained_rollouts", "trained_tokens", "skipped", "memory"),
    *(f"seconds/{phase}" for phase in PHASES),
    *(f"tokens/{phase}" for phase in ("rollout", "teacher", "student")),
    *("turns", "calls", "failed_calls", "observation_tokens", "out_of_turns", "out_of_time"),
    *(f"turn_{k}/{what}" for k in range(1, SHOWN_TURNS + 1) for what in ("reward", "length")),
)
"""Of a training step, beside the mean objective under its name."""
_MOST_STEPS = 100_000
"""Of a longer schedule that are tried."""


def check_settings(trainer: L.Trainer, module: Any) -> None:
    """Check what can be known without the data.

    Args:
        trainer: with its callbacks.
        module: the `PolicyOptimizer`.

    Raises:
        ConfigurationError: naming the key and the remedy.
    """
    for key, given, usual, remedy in (
        (
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
            1,
            "an optimizer step is a whole batch of questions, in as many micro-batches as memory "
            "asks for: raise data.questions_per_batch",
        ),
        ("gradient_clip_val", trainer.gradient_clip_val or 0, 0, "set model.limits.max_grad_norm"),
        (
            "gradient_clip_algorithm",
            trainer.gradient_clip_algorithm.value if trainer.gradient_clip_algorithm else "norm",
            "norm",
            "gradients are clipped by their norm, model.limits.max_grad_norm",
        ),
    ):
        if given != usual:
            raise ConfigurationError(f"trainer.{key}: {given} is not used here; {remedy}")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise ConfigurationError(
            f"trainer.check_val_every_n_epoch: must be >= 1, got {trainer.check_val_every_n_epoch};"
            " null counts trainer.val_check_interval over epochs"
        )
    if trainer.num_sanity_val_steps < -1:
        raise ConfigurationError(
            f"trainer.num_sanity_val_steps: must be >= -1 (all), got {trainer.num_sanity_val_steps}"
        )
    if trainer.precision not in _PRECISIONS:
        raise ConfigurationError(
            f"trainer.precision: must be {' or '.join(_PRECISIONS)}, got {trainer.precision}: what "
            "is trained is kept in float32, and log-probs are computed in it"
        )
    strategy = trainer.strategy
    check_strategy(type(strategy))
    module.policy.quantization.check()
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(
        module.policy.quantization, Unquantized
    ):
        raise ConfigurationError(IN_SHARDS)
    for callback in _callbacks(trainer):
        name = type(callback).__name__
        if isinstance(callback, _NEED_AUTOMATIC):
            raise ConfigurationError(
                f"trainer.callbacks: {name} needs Lightning's automatic optimization, and here the "
                "optimizer is stepped by hand: leave it out"
            )
        if isinstance(callback, _NEED_LOGGER) and not trainer.loggers:
            raise ConfigurationError(
                f"trainer.callbacks: {name} needs a logger: set trainer.logger, or leave it out"
            )
    _try_optimizer(module, trainer.strategy.root_device)
    for key, metric in _monitors(trainer, module):
        _check_name(key, metric, trainer, module)


def check_strategy(kind: type) -> None:
    """Check the class of the Trainer's strategy.

    Raises:
        ConfigurationError: if it is one that runs are not made for.
    """
    if not issubclass(kind, DDPStrategy | ModelParallelStrategy | SingleDeviceStrategy):
        raise ConfigurationError(
            f"trainer.strategy: {kind.__name__} is not supported: use auto, ddp, or "
            "scsdpo.checkpoints.FullySharded for sharded weights (configs/scale)"
        )


def check_course(trainer: L.Trainer, module: Any) -> None:
    """Check schedule, validations and monitors against the length of the run; say what ends it.

    Args:
        trainer: whose data are set up.
        module: the `PolicyOptimizer`.

    Raises:
        ConfigurationError: naming the key and the remedy.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, TaskDataModule):
        return
    epoch = _limited("train", len(data.train_dataloader()), trainer.limit_train_batches)
    loaders = data.val_dataloader()
    if not isinstance(loaders, list):
        _limited("val", len(loaders), trainer.limit_val_batches)
    _check_interval(trainer, epoch)
    batches = _epochs(trainer) * epoch if epoch else 0.0
    steps = batches * module.updates_per_rollout
    if trainer.max_steps >= 0:
        _say_unreached(trainer, module, epoch, batches)
        steps = min(steps, trainer.max_steps)
    _try_schedule(module, steps)
    if epoch and _validates(trainer):
        first = _first_validation(trainer, epoch)
        # A step is not taken where a batch teaches nothing, and then more are asked for.
        last = min(batches, steps / module.updates_per_rollout)
        if first > last:
            rank_zero_info(
                f"no validation takes place: the first is due after batch {first:g}, and the run "
                f"ends after {math.ceil(last)}; lower trainer.val_check_interval or "
                "check_val_every_n_epoch"
            )
    known = {prompt.category for prompt in _val_prompts(data)}
    for key, metric in _monitors(trainer, module):
        found = _ACCURACY.fullmatch(metric)
        if found and found[2] and found[2] not in known and not _foreign(trainer, module):
            raise ConfigurationError(
                f"{key}: nothing logs {metric}, for no validation question is of category "
                f"{found[2]!r} (categories: {', '.join(sorted(known - {''})) or 'none'})"
            )
    for callback in _callbacks(trainer):
        if isinstance(callback, EarlyStopping):
            callback.strict = False  # it is known to come, if not at the first look


def say_what_ended(trainer: L.Trainer, module: Any) -> None:
    """Name the limit that ended a run, and those that it did not reach."""
    steps, batches = trainer.global_step, int(module.batches)
    progress: Any = trainer.fit_loop.epoch_progress.current
    # Lightning counts an epoch that a limit cut short.
    cut: bool = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    epochs = progress.processed - cut
    stopped = [c for c in _callbacks(trainer) if isinstance(c, EarlyStopping)]
    said = [c.stopping_reason_message for c in stopped if c.stopping_reason_message]
    limits = {
        "max_steps": (trainer.max_steps, steps),
        "max_epochs": (trainer.max_epochs, epochs),
    }
    # -1, or None: no such limit.
    set_ = {name: pair for name, pair in limits.items() if pair[0] is not None and pair[0] >= 0}
    reached = [f"trainer.{name}: {most}" for name, (most, now) in set_.items() if now >= most]
    if not reached and trainer.should_stop:
        timed = any(isinstance(c, Timer) for c in _callbacks(trainer))
        reached = ["trainer.max_time" if timed else "trainer.should_stop, which a callback has set"]
        if said:
            reached = ["EarlyStopping: " + " ".join(said[0].split())]
    missed = [f"trainer.{name}: {most}" for name, (most, now) in set_.items() if now < most]
    if not reached:
        return
    rest = f" ({' and '.join(missed)} not reached)" if missed else ""
    if 0 <= trainer.max_steps < steps:
        rest += "; a batch's steps are all taken"
    rank_zero_info(
        f"ended by {' and '.join(reached)}, after {_of(batches, 'batch')} and "
        f"{_of(steps, 'optimizer step')}{rest}"
    )


def _say_unreached(trainer: L.Trainer, module: Any, epoch: int, batches: float) -> None:
    """Of two limits the later one is of no effect; said where the user may have meant it."""
    most = batches * module.updates_per_rollout
    if not 0 < most < trainer.max_steps:
        return
    times = trainer.fit_loop.max_epochs
    rank_zero_info(
        f"the run ends by trainer.max_epochs: {times}, after {_of(int(batches), 'batch')} ({epoch} "
        f"an epoch) and at most {_of(int(most), 'optimizer step')}; trainer.max_steps: "
        f"{trainer.max_steps} is not reached: set trainer.max_epochs: -1 for it to count alone"
    )


def _of(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def _epochs(trainer: L.Trainer) -> float:
    most = trainer.fit_loop.max_epochs
    return math.inf if most is None or most < 0 else most


def _limited(split: str, batches: int, limit: int | float) -> int:
    """Batches of an epoch; a share of them must be one at least."""
    if isinstance(limit, int):
        return min(batches, limit)
    left = int(batches * limit)
    if batches and limit and not left:
        raise ConfigurationError(
            f"trainer.limit_{split}_batches: {limit:g} of {_of(batches, 'batch')} is less than one "
            f"batch: give at least {1 / batches:.3g}, or the number of batches, as an integer"
        )
    return left


def _check_interval(trainer: L.Trainer, epoch: int) -> None:
    every: Any = trainer.val_check_interval
    if not isinstance(every, int) or not epoch or trainer.check_val_every_n_epoch is None:
        return
    if every > epoch and trainer.limit_val_batches > 0:
        raise ConfigurationError(
            f"trainer.val_check_interval: every {every} batches, and an epoch has {epoch}: set "
            "trainer.check_val_every_n_epoch: null, by which batches are counted over epochs, or "
            f"trainer.val_check_interval to {epoch} or less"
        )


def _validates(trainer: L.Trainer) -> bool:
    """Whether validation can take place at all."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return trainer.limit_val_batches > 0 and bool(
        data.val_sources if isinstance(data, TaskDataModule) else True
    )


def _first_validation(trainer: L.Trainer, epoch: int) -> float:
    """The batch that it is due after; inf: by the clock, or not known."""
    every: Any = trainer.val_check_interval
    if not isinstance(every, int | float):
        return 0.0  # by the clock
    if trainer.check_val_every_n_epoch is None:
        return every
    within = every if isinstance(every, int) else max(int(epoch * every), 1)
    return (trainer.check_val_every_n_epoch - 1) * epoch + within


def _val_prompts(data: TaskDataModule) -> Iterator[Any]:
    parts: Any = data.val_set.datasets if data.val_set else []
    return (part.prompts[index] for part in parts for index in part.kept)


# --------------------------------------------------------------------- optimizer and schedule


def made(key: str, make: Callable[[], T]) -> T:
    """What a factory of the configuration makes; whatever it raises is blamed on `key`."""
    try:
        return make()
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{key}: {first_line(error)}") from error


def _try_optimizer(module: Any, device: torch.device) -> None:
    """A step of it on a small matrix."""
    weight = nn.Parameter(torch.zeros(2, 2, device=device))
    optimizer = module.optimizer([weight])
    weight.grad = torch.ones_like(weight)
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigurationError(
            f"model.optimizer: {type(optimizer).__name__} cannot take a step with these arguments "
            f"on {device.type}: {first_line(error)}; torch.optim.AdamW can"
        ) from error


def is_plateau(schedule: object) -> bool:
    """Whether it is stepped with a figure, after validations."""
    return isinstance(schedule, PlateauWithoutMonitor)


def make_schedule(module: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's schedule.

    Raises:
        ConfigurationError: if it waits for a figure, and does not say which.
    """
    schedule = module.lr_scheduler(optimizer)
    if is_plateau(schedule) and not isinstance(schedule, ReduceLROnPlateau):
        raise ConfigurationError(
            "model.lr_scheduler: ReduceLROnPlateau waits for a figure, and torch's does not say "
            "which: write lightning.pytorch.cli.ReduceLROnPlateau with init_args: {monitor: "
            f"val/mean@{module.val_sampling.n}, mode: max}}"
        )
    return schedule


def _try_schedule(module: Any, steps: float) -> None:
    """Go through the whole run with it."""
    optimizer = module.optimizer([nn.Parameter(torch.zeros(2, 2))])
    schedule = make_schedule(module, optimizer)
    if is_plateau(schedule):
        return  # no step can fail
    name = f"model.lr_scheduler: {type(schedule).__name__}"
    whole = f"the run's {steps:g}" if steps < math.inf else "a run without an end"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()"
        for step in range(1, int(min(steps, _MOST_STEPS)) + 1):
            try:
                schedule.step()
            except Exception as error:
                raise ConfigurationError(
                    f"{name} fails at optimizer step {step} of {whole}: {first_line(error)}; let "
                    "its arguments cover the run, or shorten the run (trainer.max_steps)"
                ) from error
            for rate in (group["lr"] for group in optimizer.param_groups):
                if not 0 <= float(rate) < math.inf:
                    raise ConfigurationError(
                        f"{name} makes the learning rate {float(rate):g} at optimizer step {step} "
                        f"of {whole}; it must be >= 0 and finite"
                    )


# ------------------------------------------------------------------------------- monitors


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _monitors(trainer: L.Trainer, module: Any) -> Iterator[tuple[str, str]]:
    """Key and metric of whatever waits for one."""
    for callback in _callbacks(trainer):
        if isinstance(callback, Checkpoint) and callback.monitor is not None:
            yield "checkpoint.monitor", callback.monitor
        elif isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None:
            yield f"trainer.callbacks: {type(callback).__name__}.monitor", callback.monitor
    schedule = make_schedule(module, module.optimizer([nn.Parameter(torch.zeros(2, 2))]))
    if is_plateau(schedule):
        yield "model.lr_scheduler.monitor", schedule.monitor


def _foreign(trainer: L.Trainer, module: Any) -> bool:
    """Whether a class of the user's may log what is not known here."""
    parts = [module, *_callbacks(trainer)]
    return any(not f"{type(part).__module__}.".startswith(_OURS) for part in parts)


def _check_name(key: str, metric: str, trainer: L.Trainer, module: Any) -> None:
    k, known = module.val_sampling.n, [f"train/{name}" for name in _TRAIN]
    known.append(f"train/{module.steps.objective_name}")
    accuracy = _ACCURACY.fullmatch(metric)
    if accuracy and int(accuracy[3]) == k:
        if not _validates(trainer):
            raise ConfigurationError(
                f"{key}: {metric} comes of validation, and there is none: set data.val and "
                "trainer.limit_val_batches, or monitor a figure of training such as train/reward"
            )
        return
    if accuracy:
        raise ConfigurationError(
            f"{key}: nothing logs {metric}, for model.val_sampling.n is {k}; did you mean "
            f"{accuracy[1]}@{k}?"
        )
    if metric in known or _foreign(trainer, module):
        return
    close = difflib.get_close_matches(metric, [*known, f"val/mean@{k}", f"val/maj@{k}"], n=1)
    raise ConfigurationError(
        f"{key}: nothing logs {metric}; did you mean {close[0] if close else f'val/mean@{k}'}?"
    )
