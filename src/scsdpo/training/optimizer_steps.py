"""The optimizer steps on one batch of rollouts."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from scsdpo import interrupt
from scsdpo.advantage import Batch
from scsdpo.distributed import all_sum, sum_gradients
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.loss import LossOutput
from scsdpo.metrics import GapCheck, log_figures, token_metrics
from scsdpo.policy import CausalLM
from scsdpo.records import recorded
from scsdpo.seeds import run_seed
from scsdpo.state import Stateful
from scsdpo.training.budget import REMEDY, Budget, OutOfMemory, agreed, noticed
from scsdpo.training.finite import all_zero, blamed, total_norm, weight_norm
from scsdpo.training.limits import Limits
from scsdpo.training.run_checks import is_plateau
from scsdpo.training.update import Update
from scsdpo.types import stable_hash

T = TypeVar("T")

IDLE_WARNING = 10
"""Batches in a row without anything to learn from after which that is said."""
NO_CREDIT = "no rollout has both a weight and a credit"
NO_TOKEN = "every token weighs 0"
NO_GRADIENT = "the gradient is exactly 0"
REMEDIES = {
    NO_CREDIT: (
        "the questions are all too hard or all mastered, or the verifier does not accept the "
        "policy's format; look at `scsdpo predict`"
    ),
    NO_TOKEN: (
        "model.token_weighting gives every token weight 0, as Overlong does where every response "
        "reaches its cap; raise the cap and model.sampling.max_new_tokens, or choose UniformTokens"
    ),
    NO_GRADIENT: (
        "the gradient is exactly 0, as where the clip of model.advantage binds at every token or "
        "the teacher says what the student does"
    ),
}
"""Why a step has nothing to learn from, and what to do about it."""
LARGEST_GROWTH = 1e3
"""Of the weights' norm in one step: more has destroyed what they were."""


class OptimizerSteps(nn.Module):
    """Split, measure, accumulate, clip, step or skip, count, report.

    A step of which nothing can be learned is not taken: optimizer, schedule and teachers stay as
    they are, and it is counted. Nothing can be learned where, over all ranks,

    * no rollout has a weight, a credit and a token: known before any forward, none is run;
    * every token of those that have weighs 0 (`Overlong`, `Position(floor=0)`): known before the
      loss, which is not computed;
    * the gradient is exactly 0 in every entry: a credit that the forward made 0, such as one that
      the PPO clip takes at every token.

    AdamW would move weights on a gradient of 0, by decay and by momentum, and a teacher would
    follow them. A gradient that is small and not 0, rounding included, is a step. A step whose loss
    or gradient is not finite is not taken either, and is counted.

    Args:
        update: makes the losses.
        limits: of a step's gradient and memory, and of steps that achieve nothing.
        gap: how far sampler and trainer may disagree.
        objective_name: what the mean objective is called in the log.
    """

    skipped: Tensor
    """Steps that were not taken, in all."""
    bad: Tensor
    """Non-finite steps in a row."""
    idle: Tensor
    """Batches in a row without anything to learn from."""

    def __init__(
        self, update: Update, *, limits: Limits, gap: GapCheck, objective_name: str
    ) -> None:
        super().__init__()
        self.update, self.limits, self.gap = update, limits, gap
        self.objective_name = objective_name
        self.room = Budget("tokens of a micro-batch", REMEDY, together=True)
        self.under_way = False
        """Whether weights, optimizer and teachers are between two steps' states."""
        self._broken = ""
        self._norm: float | None = None
        self._watched = update
        for name in ("skipped", "bad", "idle"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def learn(self, host: L.LightningModule, policy: CausalLM, batch: Batch) -> None:
        """All steps on `batch`.

        Args:
            host: gives optimizer, schedule, backward and log, and who looks on.
            policy: is run, and gets the gradient.
            batch: what is learned from.

        Raises:
            TrainingStopped: if a limit on steps that achieve nothing is reached, or the sampler
                disagrees with the trainer.
        """
        self._watched = replace(self.update, observe=recorded(host).recorder.take_observer())
        steps = batch.steps
        old = self._measured(policy, batch, steps[1:])
        for number, rows in enumerate(steps):
            self._take(host, policy, batch if number == 0 else old, rows)

    def _measured(self, policy: CausalLM, batch: Batch, later: Sequence[Sequence[int]]) -> Batch:
        """`batch` with the log-probs before the first step, for the rows of later steps."""
        rows = [row for part in later for row in part]
        if not rows:
            return batch

        def measured(budget: int) -> Tensor:
            with agreed(policy):
                return self.update.measure(policy, batch, rows, budget)

        with self.update.timer("student"):
            old = self._within_memory(measured, policy, batch, rows)
        return replace(batch, old_logprobs=old)

    def _within_memory(
        self, work: Callable[[int], T], policy: CausalLM, batch: Batch, rows: Sequence[int]
    ) -> T:
        """`work(token budget)`, again from its start with a smaller one if memory runs out."""
        return self.room.run(
            work, most=self.limits.token_budget(policy), extent=partial(_extent, batch, rows)
        )

    def _take(
        self, host: L.LightningModule, policy: CausalLM, batch: Batch, rows: Sequence[int]
    ) -> None:
        """One optimizer step on `rows`, unless nothing there can be learned from."""
        here = batch.active[rows]
        active, tokens = all_sum(
            torch.stack([here.sum(), batch.sampled[rows][here].sum()])
        ).tolist()
        if active == 0:
            self._idle(host, policy, batch, NO_CREDIT)
            return
        with self.update.timer("student"):
            work = partial(self._accumulate, host, policy, batch, rows)
            loss, outputs = self._within_memory(work, policy, batch, rows)
        with self.update.timer("step"):
            parameters = trained_parameters(policy)
            sum_gradients(parameters)
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = total_norm(gradients)
            figures = {"loss": float(all_sum(loss)), "gradient_norm": float(norm)}
            finite = math.isfinite(figures["loss"])
            nothing = finite and figures["gradient_norm"] == 0 and all_zero(gradients)
        gap = self._gap(batch, rows, outputs)
        cap = self.update.importance.most
        seen = token_metrics([o for o, _ in outputs], self.objective_name, cap)
        counts = {"trained_rollouts": active, "trained_tokens": tokens}
        if nothing:
            counts = dict.fromkeys(counts, 0)
        log_figures(host, "train", figures | seen | gap | counts)
        self.gap.judge(gap)
        if nothing:
            host.optimizers().zero_grad()  # type: ignore[union-attr]
            self._idle(host, policy, batch, NO_GRADIENT if seen else NO_TOKEN)
            return
        self.idle.zero_()
        with self.update.timer("step"):
            self._step(host, policy, figures, norm, outputs)

    def _accumulate(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        batch: Batch,
        rows: Sequence[int],
        budget: int,
    ) -> tuple[Tensor, list[tuple[LossOutput, Tensor]]]:
        """The loss here, and per micro-batch the kernel's output and the sampler's log-probs."""
        for parameter in trained_parameters(policy):
            parameter.grad = None  # of an attempt that memory did not suffice for
        loss = torch.zeros((), dtype=torch.float64, device=host.device)
        outputs = []
        with agreed(policy), _unsynchronized(host), _seeded(host):
            for output, sampled in self._watched.losses(policy, batch, rows, budget):
                interrupt.check()
                host.manual_backward(output.loss)
                loss += output.loss.detach().double()
                outputs.append((output, sampled))
        return loss, outputs

    def _gap(
        self, batch: Batch, rows: Sequence[int], outputs: Sequence[tuple[LossOutput, Tensor]]
    ) -> dict[str, float]:
        # Later steps on a batch: the sampler's weights are those before the first of them.
        old = batch.old_logprobs[rows]
        if bool(old.isnan().all()):
            return self.gap.measure([(output.logprob, sampled) for output, sampled in outputs])
        return self.gap.measure([(old, batch.judged.responses.policy_logprobs.flatten(0, 1)[rows])])

    def _idle(self, host: L.LightningModule, policy: CausalLM, batch: Batch, reason: str) -> None:
        """Nothing to learn from: counted, and after a while said."""
        self.skipped += 1
        self.idle += 1
        log_figures(host, "train", {"skipped": float(self.skipped)})
        if self.idle == IDLE_WARNING:
            responses = batch.judged.responses
            mean = float(responses.policy_logprobs[responses.sampled].double().mean())
            rank_zero_warn(
                f"{IDLE_WARNING} batches in a row had nothing to learn from (the last: {reason}); "
                f"its mean log-prob is {mean:.2f} nats a token (noise over the whole vocabulary: "
                f"{-math.log(policy.vocabulary):.2f})"
            )
        if self.idle >= self.limits.max_idle_batches:
            rate = float(host.trainer.callback_metrics["train/pass_rate"])
            raise TrainingStopped(
                f"{int(self.idle)} batches in a row had nothing to learn from (pass rate "
                f"{rate:.2f}): {REMEDIES[reason]}"
            )

    def _step(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        figures: dict[str, float],
        norm: Tensor,
        outputs: Sequence[tuple[LossOutput, Tensor]],
    ) -> None:
        """Clip and step; a non-finite loss or gradient is skipped, counted and reported."""
        optimizer = host.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if all(map(math.isfinite, figures.values())):
            interrupt.close_window()
            self.bad.zero_()
            self._move(host, policy, optimizer, norm)
            optimizer.zero_grad()
            return
        what, of_weights = blamed([output for output, _ in outputs], figures, host)
        optimizer.zero_grad()
        if of_weights:
            raise TrainingStopped(f"{what}; go on from an older checkpoint")
        self.bad += 1
        self.skipped += 1
        rank_zero_warn(f"step skipped, not finite: {what}")
        log_figures(host, "train", {"skipped": float(self.skipped)})
        if self.bad >= self.limits.max_bad_steps:
            raise TrainingStopped(
                f"{int(self.bad)} steps in a row were not finite (last: {what}); the weights "
                "are those before the first of them. Lower the learning rate, or check the data"
            )

    def _move(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        optimizer: LightningOptimizer,
        norm: Tensor,
    ) -> None:
        """The optimizer's step and all that follows from it; the weights must survive it."""
        parameters = trained_parameters(policy)
        before = weight_norm(parameters) if self._norm is None else self._norm
        torch.nn.utils.clip_grads_with_norm_(parameters, self.limits.max_grad_norm, norm)
        self.under_way = True
        try:
            with noticed():
                optimizer.step()
        except OutOfMemory as error:  # some weights may have moved, and others not
            raise TrainingStopped(f"out of memory in the optimizer ({error}): {REMEDY}") from None
        self._norm = weight_norm(parameters)
        if not self._norm <= LARGEST_GROWTH * (before + 1):  # + 1: factors may begin at 0
            raise TrainingStopped(
                f"an optimizer's step took the policy's weights from a norm of {before:.4g} to "
                f"{self._norm:.4g}: go on from an older checkpoint with a lower learning rate "
                f"than {optimizer.param_groups[0]['lr']:g}"
            )
        self._step_schedule(host.lr_schedulers())
        self.update.teacher.after_step(policy)
        self.update.reference.after_step(policy)
        for part in host.modules():
            if isinstance(part, Stateful):
                part.after_step()
        self.under_way = False

    def _step_schedule(self, schedule: Any) -> None:
        """A schedule that fails ends the run, once the state is whole and can be saved."""
        if is_plateau(schedule):
            return  # `after_validation`
        try:
            schedule.step()
        except Exception as error:
            self._broken = f"model.lr_scheduler: {type(schedule).__name__}: {first_line(error)}"

    def stop_if_broken(self) -> None:
        """End the run if the schedule has failed since.

        Raises:
            TrainingStopped: then; the last batch is finished.
        """
        if self._broken:
            raise TrainingStopped(
                f"{self._broken}; the weights are those after the last step. Go on from the "
                "checkpoint with another schedule"
            )

    def after_validation(self, host: L.LightningModule) -> None:
        """Let a schedule that waits for a figure have it, unless nothing has logged it yet."""
        schedule: Any = host.lr_schedulers()
        figures = host.trainer.callback_metrics
        if is_plateau(schedule) and schedule.monitor in figures:
            schedule.step(figures[schedule.monitor])


def trained_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """What the optimizer moves."""
    return [p for p in policy.parameters() if p.requires_grad]


def refuse_what_cannot_resume(optimizer: torch.optim.Optimizer) -> None:
    """No checkpoint gives back the quantised states of torchao: docs/scaling.md.

    Raises:
        ConfigurationError: if `optimizer` is torchao's.
    """
    if type(optimizer).__module__.partition(".")[0] == "torchao":
        raise ConfigurationError(
            f"model.optimizer: a run with torchao's {type(optimizer).__name__} cannot go on "
            "from its checkpoints, which do not give back quantised states; use torch.optim.AdamW, "
            "and shards (configs/scale) where its 8 bytes a parameter are too many"
        )


def _extent(batch: Batch, rows: Sequence[int]) -> tuple[int, int]:
    """Tokens below which a budget puts each of `rows` into a micro-batch of its own, and tokens
    above which one holds them all.
    """
    active = batch.active[rows]
    lengths = batch.present[rows].sum(-1)[active].tolist()
    contexts = [[ids for group in each.ids for ids in group] for each in batch.contexts.values()]
    prompts = (batch.student_prompts(), *contexts)
    longest = max((len(ids) for each in prompts for ids in each), default=0)
    return max(min(lengths, default=1), 1), sum(length + longest for length in lengths)


@contextmanager
def _seeded(host: L.LightningModule) -> Iterator[None]:
    """Dropout draws by the run's seed, step and rank, also in a run that was resumed."""
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stable_hash(run_seed(), host.trainer.global_step, host.global_rank))
        yield


def _unsynchronized(host: L.LightningModule) -> AbstractContextManager[None]:
    """Under DDP, backward without its own all-reduce: `sum_gradients` makes the only one, so that
    ranks may run different numbers of micro-batches.
    """
    strategy = host.trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
