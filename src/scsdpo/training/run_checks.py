"""Finds settings of a run that cannot work, before any weight is loaded.

Lightning and torch accept most of them, and fail at the first step, validation or end of an epoch.
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
from scsdpo.metrics import MODEL_PHASES, PHASES, SHOWN_TURNS
from scsdpo.policy import Unquantized
from scsdpo.policy.quantization import IN_SHARDS

T = TypeVar("T")

_PRECISIONS = ("32-true", "bf16-mixed")
_NEED_AUTOMATIC = (
    *(BackboneFinetuning, BaseFinetuning, BatchSizeFinder, GradientAccumulationScheduler),
    *(LearningRateFinder, ModelPruning, SpikeDetection, StochasticWeightAveraging),
)
"""Callbacks that need Lightning's automatic optimization, or the loss from `training_step`."""
_NEED_LOGGER = (DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor)
_OURS = ("scsdpo.", "lightning.", "pytorch_lightning.")
"""Modules and callbacks of these packages log no other figures than those listed here."""
_ACCURACY = re.compile(r"(val/(?:(.+)/)?(?:mean|maj))@(\d+)")
_TRAIN = (
    *("pass_rate", "solve_none", "solve_all", "informative", "medium", "central", "reward"),
    *("response_length", "truncated", "effective_questions", "verifier_errors", "loss"),
    *("gradient_norm", "entropy", "importance_capped", "logprob_gap", "logprob_gap_max"),
    *("age_steps", "age_steps_max", "age_batches", "age_batches_max", "other_versions"),
    *("logprob_drift", "importance_ess", "ratio_ess", "asked_again"),
    *("logprob_gap_share", "trained_rollouts", "trained_tokens", "skipped", "memory"),
    *(f"seconds/{phase}" for phase in PHASES),
    *(f"tokens/{phase}" for phase in MODEL_PHASES),
    *("turns", "calls", "failed_calls", "observation_tokens", "out_of_turns", "out_of_time"),
    *(f"turn_{k}/{what}" for k in range(1, SHOWN_TURNS + 1) for what in ("reward", "length")),
)
"""Figures of a training step, without the mean objective, which has a name of its own."""
_MOST_STEPS = 100_000
"""Steps of a schedule that are tried, at most."""


def check_settings(trainer: L.Trainer, module: Any) -> None:
    """Check the settings that do not depend on the data.

    Args:
        trainer: the Trainer, with its callbacks.
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
            raise ConfigurationError(f"trainer.{key}: {given} would have no effect; {remedy}")
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
            f"trainer.precision: must be {' or '.join(_PRECISIONS)}, got {trainer.precision}: "
            "trainable weights are kept in float32, and log-probs are computed in it"
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
                f"trainer.callbacks: {name} needs Lightning's automatic optimization, but scsdpo "
                "uses manual optimization: remove it"
            )
        if isinstance(callback, _NEED_LOGGER) and not trainer.loggers:
            raise ConfigurationError(
                f"trainer.callbacks: {name} needs a logger: set trainer.logger, or remove it"
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
    """Check schedule, validations and monitors against the length of the run.

    Args:
        trainer: the Trainer, whose data are set up.
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
    most: int | None = trainer.fit_loop.max_epochs  # -1, or None: no such limit
    epochs = math.inf if most is None or most < 0 else most
    batches = epochs * epoch if epoch else 0.0
    steps = batches * module.updates_per_rollout
    if trainer.max_steps >= 0:
        _say_unreached(trainer, module, epoch, batches)
        steps = min(steps, trainer.max_steps)
    _try_schedule(module, steps)
    if epoch and _validates(trainer):
        first = _first_validation(trainer, epoch)
        # A batch with nothing to learn from takes no step, and then the run needs more batches.
        last = min(batches, steps / module.updates_per_rollout)
        if first > last:
            rank_zero_info(
                f"there will be no validation: the first is due after batch {first:g}, but the run "
                f"ends after {math.ceil(last)}; lower trainer.val_check_interval or "
                "check_val_every_n_epoch"
            )
        _say_no_start(trainer, module, epoch)
    parts: Any = data.val_set.datasets if data.val_set else []
    known = {part.prompts[index].category for part in parts for index in part.kept}
    for key, metric in _monitors(trainer, module):
        found = _ACCURACY.fullmatch(metric)
        if found and found[2] and found[2] not in known and not _foreign(trainer, module):
            raise ConfigurationError(
                f"{key}: {metric} is never logged, because no validation question is of category "
                f"{found[2]!r} (categories: {', '.join(sorted(known - {''})) or 'none'})"
            )
    for callback in _callbacks(trainer):
        if isinstance(callback, EarlyStopping):
            callback.strict = False  # the metric will come, though perhaps not at the first look


def say_what_ended(trainer: L.Trainer, module: Any) -> None:
    """Print the limit that ended a run, and the limits that it did not reach."""
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
    finite = {name: pair for name, pair in limits.items() if pair[0] is not None and pair[0] >= 0}
    reached = [f"trainer.{name}: {most}" for name, (most, now) in finite.items() if now >= most]
    if not reached and trainer.should_stop:
        timed = any(isinstance(c, Timer) for c in _callbacks(trainer))
        reached = ["trainer.max_time" if timed else "trainer.should_stop, which a callback has set"]
        if said:
            reached = ["EarlyStopping: " + " ".join(said[0].split())]
    missed = [f"trainer.{name}: {most}" for name, (most, now) in finite.items() if now < most]
    if not reached:
        return
    rest = f" ({' and '.join(missed)} not reached)" if missed else ""
    if 0 <= trainer.max_steps < steps:
        rest += "; the steps of the last batch are always completed"
    rank_zero_info(
        f"ended by {' and '.join(reached)}, after {_counted(batches, 'batch')} and "
        f"{_counted(steps, 'optimizer step')}{rest}"
    )


def _say_unreached(trainer: L.Trainer, module: Any, epoch: int, batches: float) -> None:
    """Print that `max_epochs` ends the run before `max_steps`, where both are set."""
    most = batches * module.updates_per_rollout
    if not 0 < most < trainer.max_steps:
        return
    times = trainer.fit_loop.max_epochs
    rank_zero_info(
        f"trainer.max_epochs: {times} ends the run after {_counted(int(batches), 'batch')} "
        f"({epoch} per epoch) and at most {_counted(int(most), 'optimizer step')}, before "
        f"trainer.max_steps: {trainer.max_steps}; set trainer.max_epochs: -1 if max_steps alone "
        "shall end it"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def _limited(split: str, batches: int, limit: int | float) -> int:
    """Number of an epoch's batches under `trainer.limit_SPLIT_batches`.

    Raises:
        ConfigurationError: if the limit is a share that is less than one batch.
    """
    if isinstance(limit, int):
        return min(batches, limit)
    left = int(batches * limit)
    if batches and limit and not left:
        raise ConfigurationError(
            f"trainer.limit_{split}_batches: {limit:g} of {_counted(batches, 'batch')} is less "
            f"than one batch: give at least {1 / batches:.3g}, or a whole number of batches"
        )
    return left


def _check_interval(trainer: L.Trainer, epoch: int) -> None:
    every: Any = trainer.val_check_interval
    if not isinstance(every, int) or not epoch or trainer.check_val_every_n_epoch is None:
        return
    if every > epoch and trainer.limit_val_batches > 0:
        raise ConfigurationError(
            f"trainer.val_check_interval: is {every} batches, but an epoch has {epoch}: set "
            "trainer.check_val_every_n_epoch: null, which counts batches over epochs, or "
            f"trainer.val_check_interval to {epoch} or less"
        )


def _validates(trainer: L.Trainer) -> bool:
    """True if there are validation questions and `limit_val_batches` allows some."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return trainer.limit_val_batches > 0 and bool(
        data.val_sources if isinstance(data, TaskDataModule) else True
    )


def _first_validation(trainer: L.Trainer, epoch: int) -> float:
    """Number of batches before the first validation; 0 where an interval of time is given."""
    within = _validation_interval(trainer, epoch) or 0
    rounds = trainer.check_val_every_n_epoch
    return within if rounds is None or not within else (rounds - 1) * epoch + within


def _validation_interval(trainer: L.Trainer, epoch: int) -> int | None:
    """Batches from one validation to the next; None where an interval of time is given."""
    every: Any = trainer.val_check_interval
    if isinstance(every, float):
        return max(int(epoch * every), 1)
    return every if isinstance(every, int) else None


def _say_no_start(trainer: L.Trainer, module: Any, epoch: int) -> None:
    """Say so if no validation falls at the end of the warm-up, with which a gain is compared."""
    steps: int = module.warmup.settings.steps if module.warmup is not None else 0
    within, rounds = _validation_interval(trainer, epoch), trainer.check_val_every_n_epoch
    if steps == 0 or within is None:
        return
    before = 0 if rounds is None else (steps - 1) // epoch  # whole epochs before the one it ends in
    missed = (steps - before * epoch) % within or (rounds is not None and (before + 1) % rounds)
    if missed:
        divisor = max(n for n in range(1, min(within, steps) + 1) if steps % n == 0)
        null = (
            " and trainer.check_val_every_n_epoch to null"
            if before or rounds not in (1, None)
            else ""
        )
        rank_zero_info(
            f"no validation falls at the end of the warm-up (model.warmup.steps: {steps}): to see "
            f"what the method gains over it, set trainer.val_check_interval to {divisor}{null}"
        )


# --------------------------------------------------------------------- optimizer and schedule


def made(key: str, make: Callable[[], T]) -> T:
    """Call a factory of the configuration; an exception becomes an error that names `key`."""
    try:
        return make()
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{key}: {first_line(error)}") from error


def _try_optimizer(module: Any, device: torch.device) -> None:
    """Take a step of the configured optimizer on a small matrix."""
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
    """True if the schedule is stepped with a figure, after validations."""
    return isinstance(schedule, PlateauWithoutMonitor)


def make_schedule(module: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's schedule.

    Raises:
        ConfigurationError: if it needs a figure and does not name one.
    """
    schedule = module.lr_scheduler(optimizer)
    if is_plateau(schedule) and not isinstance(schedule, ReduceLROnPlateau):
        raise ConfigurationError(
            "model.lr_scheduler: torch's ReduceLROnPlateau does not name the figure that it "
            "watches: write lightning.pytorch.cli.ReduceLROnPlateau with init_args: {monitor: "
            f"val/mean@{module.val_sampling.n}, mode: max}}"
        )
    return schedule


def _try_schedule(module: Any, steps: float) -> None:
    """Step the schedule through the whole run, at most `_MOST_STEPS` steps.

    Raises:
        ConfigurationError: if a step fails, or the learning rate becomes negative or non-finite.
    """
    optimizer = module.optimizer([nn.Parameter(torch.zeros(2, 2))])
    schedule = make_schedule(module, optimizer)
    if is_plateau(schedule):  # its steps cannot fail
        return
    name = f"model.lr_scheduler: {type(schedule).__name__}"
    whole = f"the run's {steps:g}" if steps < math.inf else "a run without an end"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()"
        for step in range(1, int(min(steps, _MOST_STEPS)) + 1):
            try:
                schedule.step()
            except Exception as error:
                raise ConfigurationError(
                    f"{name} fails at optimizer step {step} of {whole}: {first_line(error)}; "
                    "choose arguments for so many steps, or shorten the run (trainer.max_steps)"
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
    """(key, metric) of each callback and schedule that monitors a metric."""
    for callback in _callbacks(trainer):
        if isinstance(callback, Checkpoint) and callback.monitor is not None:
            yield "checkpoint.monitor", callback.monitor
        elif isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None:
            yield f"trainer.callbacks: {type(callback).__name__}.monitor", callback.monitor
    schedule = make_schedule(module, module.optimizer([nn.Parameter(torch.zeros(2, 2))]))
    if is_plateau(schedule):
        yield "model.lr_scheduler.monitor", schedule.monitor


def _foreign(trainer: L.Trainer, module: Any) -> bool:
    """True if a class of the user's may log figures that are not listed here."""
    parts = [module, *_callbacks(trainer)]
    return any(not f"{type(part).__module__}.".startswith(_OURS) for part in parts)


def _check_name(key: str, metric: str, trainer: L.Trainer, module: Any) -> None:
    k, known = module.val_sampling.n, [f"train/{name}" for name in _TRAIN]
    known.append(f"train/{module.steps.objective_name}")
    accuracy = _ACCURACY.fullmatch(metric)
    if accuracy and int(accuracy[3]) == k:
        if not _validates(trainer):
            raise ConfigurationError(
                f"{key}: {metric} is logged by validation, but there is none: set data.val and "
                "trainer.limit_val_batches, or monitor a figure of training such as train/reward"
            )
        return
    if accuracy:
        raise ConfigurationError(
            f"{key}: {metric} is never logged, because model.val_sampling.n is {k}; did you mean "
            f"{accuracy[1]}@{k}?"
        )
    if metric in known or _foreign(trainer, module):
        return
    close = difflib.get_close_matches(metric, [*known, f"val/mean@{k}", f"val/maj@{k}"], n=1)
    raise ConfigurationError(
        f"{key}: {metric} is never logged; did you mean {close[0] if close else f'val/mean@{k}'}?"
    )
