"""The step, from a judged batch to the optimizer's step; read it from top to bottom.

OptimizerSteps.learn        all optimizer steps on one batch
  OptimizerSteps._take      one of them: backward, clip, step; or the reason why none is taken
    Update.losses           measured tables, token weights, and the loss of each micro-batch
      Forwards              which rows run in which micro-batches, for student and teachers
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from scsdpo import contracts, interrupt
from scsdpo.advantage import Batch
from scsdpo.distributed import all_max, all_sum, sum_gradients
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.loss import (
    Buffers,
    Chunk,
    Derivation,
    Head,
    HeadGradient,
    Importance,
    LossOutput,
    Objective,
    Observer,
    Signals,
    TeacherOutput,
    TokenLogits,
    Tokens,
    chunks,
    credit_loss,
    unobserved,
)
from scsdpo.metrics import (
    GapCheck,
    PhaseTimer,
    TokenOrigin,
    age_metrics,
    log_figures,
    token_metrics,
)
from scsdpo.policy import CausalLM, Rows, Runner, Weights
from scsdpo.policy.adapter import WideHead
from scsdpo.policy.experts import balance_loss, differ, per_token
from scsdpo.policy.sharding import is_sharded
from scsdpo.policy.transfer import download, upload
from scsdpo.records import recorded
from scsdpo.reduction import Reduction
from scsdpo.seeds import run_seed
from scsdpo.state import Stateful
from scsdpo.teacher import Context, Teacher
from scsdpo.training.budget import (
    REMEDY,
    Budget,
    OutOfMemory,
    as_out_of_memory,
    out_of_memory_on_all_ranks,
)
from scsdpo.training.finite import all_zero, not_finite_because, total_norm, weight_norm
from scsdpo.training.run_checks import is_plateau
from scsdpo.types import stable_hash
from scsdpo.weighting import TokenWeighting

T = TypeVar("T")
LogitsOf = Callable[[slice, Buffers], TokenLogits]
"""Maps a slice of a micro-batch's tokens to their logits, which are written into the buffers."""

IDLE_WARNING = 10
"""A warning comes after so many batches in a row with nothing to learn from."""
NO_CREDIT = "every rollout has weight 0 or no credit, as in groups whose rewards are all equal"
NO_EXAMPLE = "no question has a right response for the warm-up"
NO_TOKEN = "every token weighs 0"
NO_GRADIENT = "the gradient is exactly 0"
REMEDIES = {
    NO_CREDIT: (
        "the questions are all too hard or all mastered, or the verifier does not accept the "
        "policy's format; look at `scsdpo predict`"
    ),
    NO_EXAMPLE: (
        "set model.warmup.examples to GoldAnswers if the data have answers, or leave the stage out "
        "with model.warmup.steps: 0"
    ),
    NO_TOKEN: (
        "model.token_weighting gives every token weight 0, as Overlong does if all responses are "
        "cut off: raise model.sampling.max_new_tokens, or set model.token_weighting to "
        "UniformTokens"
    ),
    NO_GRADIENT: (
        "the gradient is exactly 0. Look at model.advantage, whose clip may apply to every token, "
        "and at model.teacher, whose distribution may equal the student's"
    ),
}
"""Reason why a step has nothing to learn from -> what to do about it."""
_CUT = "raise model.sampling.max_new_tokens, or see in `scsdpo predict` why responses do not end"
_SHOWN_IDLE = ("pass_rate", "truncated")
LARGEST_GROWTH = 1e3
"""Largest factor by which the weights' norm may grow in one step; more destroys the model."""
OBJECTIVE_OF_TABLES = (
    "these token weights read the advantage's value at each token before the loss is computed, "
    "which this model.advantage cannot give: set model.token_weighting to UniformTokens, or "
    "choose another model.advantage"
)


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Limits:
    """Bounds on a step's gradient and memory, and on steps and batches that achieve nothing.

    Args:
        max_grad_norm: the gradient is clipped to this norm. inf: it is not clipped.
        max_tokens: distinct tokens of a micro-batch, whose activations are in memory at a time;
            `auto` measures how many fit. It changes memory and speed, and no number.
        max_bad_steps: the run stops after so many non-finite steps in a row.
        max_idle_batches: the run stops after so many batches in a row with nothing to learn from.
            They take no step, so that `trainer.max_steps` alone would never end it.

    Raises:
        ValueError: if an argument is outside its range.
    """

    max_grad_norm: float = 1.0
    max_tokens: PositiveInt | Literal["auto"] = "auto"
    max_bad_steps: int = 5
    max_idle_batches: int = 100

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"`Limits(max_grad_norm=...)` must be > 0 (.inf: no clipping), "
                f"got {self.max_grad_norm}"
            )
        for name in ("max_bad_steps", "max_idle_batches"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`Limits({name}=...)` must be >= 1, got {value}")

    def token_budget(self, policy: CausalLM) -> int:
        """`max_tokens`, measured from the memory that is free now where it is `auto`."""
        return policy.token_budget() if self.max_tokens == "auto" else self.max_tokens


def trained_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer moves."""
    return [p for p in policy.parameters() if p.requires_grad]


def without_all_reduce(trainer: L.Trainer) -> AbstractContextManager[Any]:
    """Keep DDP's backward from reducing gradients.

    `sum_gradients` does that once a step, so that ranks may run different numbers of micro-batches.
    """
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()


class OptimizerSteps(nn.Module):
    """The optimizer steps on a batch: split, accumulate, clip, step or skip, count, report.

    A step with nothing to learn from is not taken: optimizer, schedule and teachers stay as they
    are, and the step is counted. There is nothing to learn from if, over all ranks,

    * no rollout has a weight, a credit and a token. This is known before any forward, and none is
      run;
    * every token of the remaining rollouts weighs 0 (`Overlong`, `Position(floor=0)`). This is
      known before the loss, which is not computed;
    * the gradient is exactly 0 in every entry, as where the PPO clip binds at every token.

    AdamW would move weights on a gradient of 0, by weight decay and momentum, and a teacher would
    follow them. A gradient that is small but not 0 is a step. A step whose loss or gradient is not
    finite is not taken either, and is counted.

    Args:
        update: computes the losses.
        limits: bounds on a step's gradient and memory, and on steps that achieve nothing.
        gap: how far sampler and trainer may disagree.
        objective_name: name of the mean objective in the log.
        prefix: prefix of all figures in the log.
        counts: whether `Stateful.after_step` is called after each step.
    """

    skipped: Tensor
    """Number of steps that were not taken."""
    bad: Tensor
    """Non-finite steps in a row."""
    idle: Tensor
    """Batches in a row with nothing to learn from."""

    def __init__(
        self,
        update: "Update",
        *,
        limits: Limits,
        gap: GapCheck,
        objective_name: str,
        prefix: str = "train",
        counts: bool = True,
    ) -> None:
        super().__init__()
        self.prefix, self.counts = prefix, counts
        self.update, self.limits, self.gap = update, limits, gap
        self.objective_name = objective_name
        self.memory = Budget("tokens of a micro-batch", REMEDY, together=True)
        self.under_way = False
        """True while a step has changed some weights and not yet all that follows from them."""
        self._broken = ""
        self._norm: float | None = None
        for name in ("skipped", "bad", "idle"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def learn(self, host: L.LightningModule, policy: CausalLM, batch: Batch) -> None:
        """All optimizer steps on `batch`.

        Args:
            host: the `PolicyOptimizer`, for its optimizer, schedule, backward and log.
            policy: is run, and gets the gradient.
            batch: the rollouts to learn from.

        Raises:
            TrainingStopped: if a limit on steps that achieve nothing is reached, or the sampler
                disagrees with the trainer.
        """
        update = replace(self.update, observe=recorded(host).recorder.take_observer())
        unmeasured, later = batch, [row for rows in batch.steps[1:] for row in rows]
        if later:  # their ratios S / S_old are to the policy before the first step
            with update.timer("student"):
                old = self.memory.run(
                    partial(update.measure, policy, batch, later),
                    most=self.limits.token_budget(policy),
                    extent=partial(_extent, batch, later),
                )
            batch = replace(batch, old_logprobs=old)
        for number, rows in enumerate(batch.steps):
            first = number == 0
            self._take(host, policy, update, unmeasured if first else batch, rows, first=first)

    def _take(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        update: "Update",
        batch: Batch,
        rows: Sequence[int],
        *,
        first: bool,
    ) -> None:
        """One optimizer step on `rows`: backward, clip, step; or count why it is not taken."""
        (index,) = upload([torch.tensor(rows, dtype=torch.int64)], host.device)
        here = batch.active[index]
        trained = torch.stack([here.sum(), (here * batch.sampled[index].sum(-1)).sum()])
        active, tokens = all_sum(trained).tolist()
        if active == 0:
            self._idle(host, policy, batch, NO_CREDIT if self.prefix == "train" else NO_EXAMPLE)
            return
        with update.timer("student"):  # begins again with fewer tokens if memory runs out
            loss, outputs = self.memory.run(
                partial(self._accumulate, host, policy, update, batch, rows),
                most=self.limits.token_budget(policy),
                extent=partial(_extent, batch, rows),
            )
        with update.timer("step"):
            parameters = trained_parameters(policy)
            sum_gradients(parameters)
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = total_norm(gradients)
            known = torch.stack([all_sum(loss), norm.to(loss)]).tolist()
            figures = dict(zip(("loss", "gradient_norm"), known, strict=True))
            finite = all(map(math.isfinite, figures.values()))
            nothing = finite and figures["gradient_norm"] == 0 and all_zero(gradients)
        # The sampler had the weights before the batch's first step, so its log-probs are compared
        # with those of that step, and not with those of the current one.
        if first:
            pairs = [(output.logprob, origin.of_present_weights) for output, origin in outputs]
        else:
            sampled = batch.judged.responses.policy_logprobs.flatten(0, 1)
            present = sampled.where(batch.ages[..., 0] == 0, torch.nan)
            pairs = [(batch.old_logprobs[index], present[index])]
        gap = self.gap.measure(pairs)
        seen = token_metrics(
            [output for output, _ in outputs], self.objective_name, update.importance.most
        )
        counts = {
            "trained_rollouts": 0 if nothing else active,
            "trained_tokens": 0 if nothing else tokens,
        }
        ages = age_metrics(outputs) if batch.judged.responses.drawn_at else {}
        log_figures(host, self.prefix, figures | seen | gap | ages | counts)
        self.gap.judge(gap)
        optimizer = host.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if nothing:
            optimizer.zero_grad()
            self._idle(host, policy, batch, NO_GRADIENT if seen else NO_TOKEN)
            return
        self.idle.zero_()
        with update.timer("step"):
            if not finite:
                why, of_weights = not_finite_because([each for each, _ in outputs], figures, host)
                optimizer.zero_grad()
                self._skip(host, why, of_weights=of_weights)
                return
            interrupt.close_window()
            self.bad.zero_()
            self._move(host, policy, optimizer, norm)
            optimizer.zero_grad()

    def _accumulate(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        update: "Update",
        batch: Batch,
        rows: Sequence[int],
        max_tokens: int,
    ) -> tuple[Tensor, list[tuple[LossOutput, TokenOrigin]]]:
        """Run forward and backward of all micro-batches with at most `max_tokens` each.

        Returns:
            This rank's loss, and for each micro-batch the kernel's output and its tokens' origin.
        """
        for parameter in trained_parameters(policy):  # an attempt that ran out of memory left some
            parameter.grad = None
        loss = torch.zeros((), dtype=torch.float64, device=host.device)
        outputs = []
        apart = without_all_reduce(host.trainer)
        devices = [host.device] if host.device.type == "cuda" else []
        with out_of_memory_on_all_ranks(policy), apart, torch.random.fork_rng(devices=devices):
            # Dropout depends on the run's seed, step and rank alone, so that a resumed run repeats.
            torch.manual_seed(stable_hash(run_seed(), host.trainer.global_step, host.global_rank))
            for output, origin in update.losses(policy, batch, rows, max_tokens):
                interrupt.check()
                host.manual_backward(output.loss)
                loss += output.loss.detach().double()
                outputs.append((output, origin))
        return loss, outputs

    def _move(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        optimizer: LightningOptimizer,
        norm: Tensor,
    ) -> None:
        """Clip, step the optimizer, schedule, teachers and stateful strategies.

        Raises:
            TrainingStopped: if memory runs out in the optimizer, or the weights' norm grows by more
                than `LARGEST_GROWTH`.
        """
        parameters = trained_parameters(policy)
        before = weight_norm(parameters) if self._norm is None else self._norm
        torch.nn.utils.clip_grads_with_norm_(parameters, self.limits.max_grad_norm, norm)
        self.under_way = True
        try:
            with as_out_of_memory():
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
        schedule: Any = host.lr_schedulers()
        if not is_plateau(schedule):  # `after_validation` steps those
            try:
                schedule.step()
            except Exception as error:  # `stop_if_broken` raises it, when the state can be saved
                name = type(schedule).__name__
                self._broken = f"model.lr_scheduler: {name}: {first_line(error)}"
        self.update.teacher.after_step(policy)
        self.update.reference.after_step(policy)
        for part in host.modules() if self.counts else ():
            if isinstance(part, Stateful):
                part.after_step()
        self.under_way = False

    def _idle(self, host: L.LightningModule, policy: CausalLM, batch: Batch, reason: str) -> None:
        """Count a step with nothing to learn from; warn after `IDLE_WARNING` in a row, then stop.

        Raises:
            TrainingStopped: after `Limits.max_idle_batches` in a row.
        """
        self.skipped += 1
        self.idle += 1
        log_figures(host, self.prefix, {"skipped": float(self.skipped)})
        if self.idle == IDLE_WARNING:
            responses = batch.judged.responses
            mean = float(responses.policy_logprobs[responses.sampled].double().mean())
            noise = -math.log(policy.vocabulary)
            likely = (
                f". The mean log-prob of its tokens is {mean:.2f}; a policy that samples noise has "
                f"{noise:.2f}"
            )
            rank_zero_warn(
                f"{IDLE_WARNING} batches in a row had nothing to learn from (the last: {reason})"
                f"{'' if math.isnan(mean) else likely}"
            )
        if self.idle >= self.limits.max_idle_batches:
            remedy, figures = REMEDIES[reason], ""
            if self.prefix == "train":  # a warm-up has no such figures
                logged = host.trainer.callback_metrics
                rate, cut = (float(logged[f"{self.prefix}/{name}"]) for name in _SHOWN_IDLE)
                figures = f"; pass rate {rate:.2f}, {cut:.0%} of the responses truncated"
                remedy = _CUT if reason == NO_CREDIT and cut > 0.5 else remedy
            raise TrainingStopped(
                f"{int(self.idle)} batches in a row had nothing to learn from "
                f"(model.limits.max_idle_batches{figures}): {remedy}"
            )

    def _skip(self, host: L.LightningModule, why: str, *, of_weights: bool) -> None:
        """Count a step whose loss or gradient is not finite.

        Raises:
            TrainingStopped: if weights are not finite, or after `Limits.max_bad_steps` in a row.
        """
        if of_weights:
            raise TrainingStopped(f"{why}; resume from an older checkpoint with --ckpt_path")
        self.bad += 1
        self.skipped += 1
        rank_zero_warn(f"step skipped, because its loss or gradient is not finite: {why}")
        log_figures(host, self.prefix, {"skipped": float(self.skipped)})
        if self.bad >= self.limits.max_bad_steps:
            raise TrainingStopped(
                f"{int(self.bad)} steps in a row were not finite (last: {why}); the weights "
                "are those before the first of them. Lower the learning rate, or check the data"
            )

    def stop_if_broken(self) -> None:
        """End the run if the learning rate's schedule failed in an earlier step.

        Raises:
            TrainingStopped: then. The last batch is finished, and its state can be saved.
        """
        if self._broken:
            raise TrainingStopped(
                f"{self._broken}; the weights are those after the last step. Go on from the "
                "checkpoint with another schedule"
            )

    def after_validation(self, host: L.LightningModule) -> None:
        """Step a schedule that waits for a figure (`ReduceLROnPlateau`), if it has been logged."""
        schedule: Any = host.lr_schedulers()
        figures = host.trainer.callback_metrics
        if is_plateau(schedule) and schedule.monitor in figures:
            schedule.step(figures[schedule.monitor])


def _extent(batch: Batch, rows: Sequence[int]) -> tuple[int, int]:
    """Two budgets of tokens: up to the first each of `rows` is a micro-batch of its own, and from
    the second on one micro-batch holds them all.
    """
    active = batch.active[rows]
    lengths = batch.present[rows].sum(-1)[active].tolist()
    contexts = [[ids for group in each.ids for ids in group] for each in batch.contexts.values()]
    prompts = (batch.student_prompts(), *contexts)
    longest = max((len(ids) for each in prompts for ids in each), default=0)
    return max(min(lengths, default=1), 1), sum(length + longest for length in lengths)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Computes the losses of some rows of a batch, micro-batch by micro-batch.

    Args:
        teacher: runs on the rows for which the plan needs it.
        reference: the second teacher, for an anchor.
        token_weighting: factor on each token.
        reduction: how token losses add up; denominators are those of the whole optimizer step.
        importance: factor on each token from the sampler's log-probs.
        needs: fields of `Signals` that the strategies read. A pass without gradient fills them.
        derivations: functions of `Signals` whose tables the strategies read.
        observe: the kernel calls it with each block's credit. It changes nothing.
        timer: measures the teachers' time.
    """

    teacher: Teacher
    reference: Teacher
    token_weighting: TokenWeighting
    reduction: Reduction
    importance: Importance
    needs: frozenset[str]
    derivations: tuple[Derivation, ...] = ()
    observe: Observer = unobserved
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def losses(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[LossOutput, TokenOrigin]]:
        """Yield for each micro-batch its share of the step's loss, and its tokens' origin.

        The caller runs backward on each before it asks for the next. Nothing is yielded where every
        token of all ranks weighs 0.

        Args:
            policy: is run, and gets the gradient.
            batch: the rollouts with their plan.
            rows: rows of this optimizer step; the active ones among them are run.
            max_tokens: tokens whose activations are alive at a time. It changes memory and speed,
                and no number.
        """
        forwards = self._forwards(policy, batch, rows, max_tokens)
        with out_of_memory_on_all_ranks(policy):  # collectives follow
            signals = forwards.tables(self.needs)
        for make in (*batch.plan.derivations, *self.derivations):
            signals.derive(make)

        # [R]: weight of each rollout / denominator.
        step, scale = forwards.index, torch.zeros_like(batch.weights.flatten())
        shares = self.reduction.coefficients(batch.sampled.sum(-1)[step], batch.active[step])
        scale[step] = shares.to(scale.dtype)
        scale *= batch.weights.flatten()
        # [R, L]: token weights.
        distilled = batch.sampled & (forwards.reads["teacher"] & forwards.chosen)[:, None]
        weights = contracts.weights(
            self.token_weighting.weigh(signals, distilled),
            of=f"{type(self.token_weighting).__name__}.weigh",
            axes="[R, L]",
            shape=tuple(distilled.shape),
        )
        weighed = scale[:, None] * weights * (batch.sampled & forwards.chosen[:, None])
        if not bool(all_max(weighed.any().double())):
            return

        sampler, ages = batch.judged.responses.policy_logprobs.flatten(0, 1), batch.ages
        gradient = HeadGradient(len(forwards.micro_batches))
        self.timer.count("student", forwards.tokens("student", forwards.running))
        for number, micro in enumerate(forwards.micro_batches):
            tokens = Tokens(
                ids=forwards.of_tokens(number, batch.ids),
                places=forwards.places(number),
                rollouts=forwards.rollouts(number),
                scale=forwards.of_tokens(number, scale[:, None].expand_as(batch.sampled)),
                weight=forwards.of_tokens(number, weights),
                signals=signals,
            )
            objective = Objective(
                credit=batch.plan.credit,
                importance=self._importance,
                teacher=forwards.teacher("teacher", number),
                reference=forwards.teacher("reference", number),
                others=tuple(forwards.teacher(slot, number) for slot in forwards.others),
                temperature=forwards.temperature,
                observe=self.observe,
            )
            origin = TokenOrigin(
                logprob=forwards.of_tokens(number, sampler), age=forwards.of_tokens(number, ages)
            )
            forwards.forget(number)
            credit = partial(credit_loss, tokens=tokens, objective=objective, gradient=gradient)
            loss = partial(forwards.with_experts, number, credit)
            output = forwards.student.run(micro, forwards.with_head(loss))
            yield output, origin
            forwards.student.done(micro)

    def _importance(self, chunk: Chunk) -> Tensor:
        return contracts.numbers(
            self.importance.weigh(chunk),
            of=f"{type(self.importance).__name__}.weigh",
            axes="[n]",
            shape=tuple(chunk.ids.shape),
        )

    def measure(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Tensor:
        """[R, L]: log S(y) of the active ones among `rows`, without gradient; nan elsewhere."""
        with out_of_memory_on_all_ranks(policy):
            forwards = self._forwards(policy, batch, rows, max_tokens)
            measured = batch.sampled & forwards.chosen[:, None]
            table = forwards.tables({"student_logprob"}).student_logprob
            return torch.where(measured, table, torch.nan)

    def _forwards(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> "Forwards":
        owners = {"teacher": self.teacher, "reference": self.reference}
        teachers = {slot: owners[slot.partition("/")[0]] for slot in batch.contexts}
        return Forwards(policy, teachers, batch, rows, max_tokens=max_tokens, timer=self.timer)


@dataclass(eq=False)
class _Pair:
    """One set of a teacher's weights and one context that it reads."""

    weights: Weights
    context: Context
    slots: list[str]
    """The slots that ask for this pair: `teacher`, `teacher/NAME`, `reference`."""
    reads: Tensor
    """[R] bool on the host: rows on which one of the slots asks for it."""
    runs: list[bool] = field(default_factory=list)
    """[micro-batches]: the pair runs there. With sharded weights it runs on all ranks if on any."""
    made: dict[int, tuple[Tensor, Head] | None] = field(default_factory=dict)
    """Number of the micro-batch -> hidden states [N, D] and head; None: no row here asks for it."""
    runner: Runner | None = None


class Forwards:
    """Splits a step's rows into micro-batches, and runs student and teachers on them.

    The host waits for the device once, at the start, and knows all rows and places from then on.

    Args:
        policy: the student; teachers may run with its weights.
        teachers: slot (`teacher`, `teacher/NAME`, `reference`) -> teacher.
        batch: the rollouts with their plan.
        rows: rows of this optimizer step; the active ones among them are run.
        max_tokens: tokens whose activations are alive at a time.
        timer: measures the teachers' time.
    """

    def __init__(
        self,
        policy: CausalLM,
        teachers: Mapping[str, Teacher],
        batch: Batch,
        rows: Sequence[int],
        *,
        max_tokens: int,
        timer: PhaseTimer,
    ) -> None:
        self.policy, self.teachers, self.batch, self.timer = policy, teachers, batch, timer
        self._max_tokens = max_tokens
        prompts = {"student": batch.student_prompts()} | {
            slot: [ids for group in each.ids for ids in group]
            for slot, each in batch.contexts.items()
        }
        self.reads = {slot: batch.reads(slot) for slot in batch.contexts}
        """Slot -> [R] bool: rows whose credit reads it."""
        self.others = [slot for slot in batch.contexts if slot.startswith("teacher/")]
        """Slots of the teacher's further contexts, in order."""
        ids, present, self._sampled, active, *reads = download(
            [batch.ids, batch.present, batch.sampled, batch.active, *self.reads.values()]
        )
        self._read_by = dict(zip(self.reads, reads, strict=True))
        self._rows = {
            slot: Rows(
                prompts=each,
                ids=ids,
                present=present,
                sampled=self._sampled,
                pad_id=policy.chat.pad_id,
            )
            for slot, each in prompts.items()
        }
        step = torch.tensor(rows, dtype=torch.long)
        self.running = torch.zeros_like(active).index_fill_(0, step, True) & active
        """[R] bool on the host: the rows that are run."""
        self.index, chosen = upload([step, self.running.long()], batch.ids.device)
        self.chosen = chosen.bool()
        """[R] bool: `running`, on the device."""
        self._places: dict[int, Tensor] = {}
        self.temperature = batch.judged.responses.temperature
        noted = batch.judged.responses.experts
        self._experts = noted.flatten(0, 1)
        """[R, L, layers, k] the sampler's choice of experts; layers is 0 if it reports none."""
        learned = (self.running & self._sampled.any(-1)).sum()
        self._learned = max(float(all_sum(learned.double())), 1.0)
        """Number of responses that are run, over all ranks."""
        self._watches = policy.expert_balance > 0 or noted.shape[-2] > 0
        self.student = self._runner("student", self.running, watches=self._watches)
        """Runs each micro-batch once, with a gradient."""
        self.micro_batches = self.student.micro_batches()
        self._heads: dict[nn.Linear, Head] = {}
        self._own = policy.adapter.current()
        self._measured: Runner | None = None
        self._pairs = self._paired()

    def _paired(self) -> list[_Pair]:
        """Each pair of weights and context that some slot asks for, once.

        Slots that ask for equal pairs share the forwards. Pairs are equal if weights and contexts
        are. Rendered prompts are not compared: ranks have different ones, and must agree.
        """
        pairs: list[_Pair] = []
        for slot, reads in self._read_by.items():
            teacher = self.teachers[slot]
            parts = teacher.context.named
            name = slot.partition("/")[2]
            context = parts[name] if name in parts else next(iter(parts.values()))
            for weights in teacher.weights_to_run(self.policy):
                same = [p for p in pairs if p.weights.same(weights) and p.context == context]
                if same:
                    same[0].slots.append(slot)
                    same[0].reads |= reads
                else:
                    pairs.append(_Pair(weights, context, [slot], reads.clone()))
        if pairs:
            here = torch.tensor(
                [[float(p.reads[micro].any()) for micro in self.micro_batches] for p in pairs]
            )
            asked = all_max(here) if is_sharded(self.policy) else here
            for pair, runs in zip(pairs, asked.bool().tolist(), strict=True):
                pair.runs = runs
        return pairs

    def _runner(
        self,
        slot: str,
        wanted: Tensor,
        weights: Weights | None = None,
        *,
        watches: bool = False,
    ) -> Runner:
        chosen, rows = wanted.nonzero()[:, 0].tolist(), self._rows[slot]
        return self.policy.runner(rows, chosen, self._max_tokens, weights, watches=watches)

    def tokens(self, slot: str, wanted: Tensor) -> int:
        """Number of distinct tokens of the wanted rows [R], with the slot's prompts."""
        rows = wanted.nonzero()[:, 0].tolist()
        return self._rows[slot].at(rows).distinct_tokens if rows else 0

    def rollouts(self, number: int) -> list[int]:
        """[N] the row of each sampled token of the micro-batch, row-major."""
        micro = self.micro_batches[number]
        counts = self._sampled[micro].sum(-1).tolist()
        return [row for row, count in zip(micro, counts, strict=True) for _ in range(count)]

    def places(self, number: int) -> Tensor:
        """[N] int64: flat indices of the micro-batch's sampled tokens into tables [R, L]."""
        if number not in self._places:
            here = torch.zeros_like(self._sampled)
            here[self.micro_batches[number]] = self._sampled[self.micro_batches[number]]
            flat = here.flatten().nonzero()[:, 0]
            (self._places[number],) = upload([flat], self.batch.ids.device)
        return self._places[number]

    def of_tokens(self, number: int, table: Tensor) -> Tensor:
        """[N, ...]: the entries of `table` [R, L, ...] at the micro-batch's sampled tokens."""
        return table.flatten(0, 1).index_select(0, self.places(number))

    def _write(self, number: int, table: Tensor, values: Tensor) -> None:
        """Write `values` [N] into `table` [R, L] at the micro-batch's sampled tokens."""
        table.view(-1).index_copy_(0, self.places(number), values)

    def with_head(
        self, use: Callable[[Tensor, nn.Linear, Head], T]
    ) -> Callable[[Tensor, nn.Linear], T]:
        """Give `use` the head in the dtype of its product, which is cast once a step."""

        def used(hidden: Tensor, linear: nn.Linear) -> T:
            if linear in self._heads:
                return use(hidden, linear, self._heads[linear])
            head = Head.of(linear).first(self.policy.vocabulary)
            kept = not isinstance(linear, WideHead)  # each forward makes a new one of those
            # A head that needs no cast is FSDP2's own tensor, which is freed after the forward.
            if kept and head.weight.dtype != linear.weight.dtype:
                self._heads[linear] = head
            return use(hidden, linear, head)

        return used

    def with_experts(
        self,
        number: int,
        credit: Callable[[Tensor, nn.Linear, Head], LossOutput],
        hidden: Tensor,
        linear: nn.Linear,
        head: Head,
    ) -> LossOutput:
        """The credit loss plus the load-balancing loss, and the tokens that other experts get."""
        output = credit(hidden, linear, head)
        if not self._watches:
            return output
        routes = self.student.routes
        if weight := self.policy.expert_balance:
            lengths = self._sampled[self.micro_batches[number]].sum(-1).tolist()
            balance = balance_loss(routes, lengths, per_token(self.policy.language_model))
            output = output._replace(loss=output.loss + weight / self._learned * balance)
        if self._experts.shape[-2]:
            elsewhere = differ(routes.detach(), self.of_tokens(number, self._experts))
            output = output._replace(elsewhere=elsewhere)
        return output

    def teacher(self, slot: str, number: int) -> TeacherOutput:
        """Run a slot's teacher on a micro-batch; the output is empty where no row asks for it.

        A pair of weights and context runs once, whichever slot asks first, and its output is kept
        until `forget`. Rows that do not ask for it have hidden states of 0, thus uniform logits,
        which no credit reads.
        """
        micro, pairs = self.micro_batches[number], [p for p in self._pairs if slot in p.slots]
        for pair in pairs:
            if not pair.runs[number] or number in pair.made:
                continue
            if pair.runner is None:
                reading = pair.reads & self.running
                self.timer.count("teacher", self.tokens(pair.slots[0], reading))
                pair.runner = self._runner(pair.slots[0], reading, pair.weights)
            reads = pair.reads[micro].tolist()
            some = [row for row, read in zip(micro, reads, strict=True) if read]
            with self.timer("teacher"), self.policy.in_force(pair.weights):
                hidden, head = pair.runner.run(some, self.with_head(_hidden_and_head))
                pair.runner.done(some)
            pair.made[number] = (self._placed(number, hidden, some), head) if some else None
        made = [pair.made.get(number) for pair in pairs]
        found = [each for each in made if each is not None]
        whole = found if len(found) == len(made) else []
        return TeacherOutput(
            hidden=tuple(hidden for hidden, _ in whole),
            heads=tuple(head for _, head in whole),
            combine=self.teachers[slot].combine,
        )

    def forget(self, number: int) -> None:
        """Free the teachers' outputs on a micro-batch, and its places."""
        self._places.pop(number, None)
        for pair in self._pairs:
            pair.made.pop(number, None)

    def _placed(self, number: int, hidden: Tensor, some: Sequence[int]) -> Tensor:
        """[N, D]: `hidden` at the tokens of the rows `some` of the micro-batch, zeros elsewhere."""
        rollouts, wanted = self.rollouts(number), set(some)
        here = [i for i, row in enumerate(rollouts) if row in wanted]
        if len(here) == len(rollouts):
            return hidden
        (index,) = upload([torch.tensor(here, dtype=torch.long)], hidden.device)
        return hidden.new_zeros((len(rollouts), *hidden.shape[1:])).index_copy_(0, index, hidden)

    # ------------------------------------------- tables measured before the loss, without gradient

    @torch.no_grad()
    def tables(self, needs: Set[str]) -> Signals:
        """Measure signals for every row of the step. A teacher that runs here is not run again.

        Args:
            needs: fields of `Signals` to fill; the others, and rows that do not run, keep zeros.

        Raises:
            ConfigurationError: if `needs` has the objective, and that depends on tables itself.
        """
        batch = self.batch
        signals = Signals.unmeasured(
            batch.sampled,
            batch.judged.ended.flatten(),
            batch.judged.responses.sampling_logprobs.flatten(0, 1),
            batch.old_logprobs,
            len(self.others),
        )
        of_student = any(name.startswith("student") for name in needs)
        of_teacher = any(name.startswith("teacher") for name in needs)
        of_objective = "objective" in needs
        if of_objective and batch.plan.derivations:
            raise ConfigurationError(OBJECTIVE_OF_TABLES)
        asked = {
            "teacher": of_teacher or of_objective,
            "reference": of_objective,
            **dict.fromkeys(self.others, "others" in needs or of_objective),
        }
        # A forward of sharded weights is a collective: the student runs on all ranks if a teacher's
        # rule may ask for it on one.
        of_kl = "teacher_kl" in needs
        combines = of_teacher and type(self.teachers["teacher"]).combine is not Teacher.combine
        in_step = of_objective or ((combines or of_kl) and is_sharded(self.policy))
        for number, micro in enumerate(self.micro_batches if needs else []):
            write = partial(self._write, number)
            student = cache(partial(self._current, micro))
            if in_step:
                student()
            if of_student:
                logprobs, entropies, _ = self._read(number, student())
                write(signals.student_logprob, logprobs)
                write(signals.student_entropy, entropies)
            outputs = {slot: self.teacher(slot, number) for slot, run in asked.items() if run}
            if of_teacher and outputs["teacher"].hidden:
                target = self._target(outputs["teacher"], student)
                made = self._read(number, target, student() if of_kl else None)
                logprobs, entropies, divergences = made
                write(signals.teacher_logprob, logprobs)
                write(signals.teacher_entropy, entropies)
                reads = self.reads["teacher"][:, None].expand_as(batch.sampled)
                write(signals.teacher_kl, divergences.where(self.of_tokens(number, reads), 0.0))
            for table, slot in zip(signals.others, self.others, strict=True):
                if "others" in needs and outputs[slot].hidden:
                    logprobs, _, _ = self._read(number, self._target(outputs[slot], student))
                    reads = self.reads[slot][:, None].expand_as(batch.sampled)
                    write(table, logprobs.where(self.of_tokens(number, reads), torch.nan))
            if of_objective:
                objective = self._objective(number, student(), outputs, signals)
                write(signals.objective, objective)
        return signals

    def _current(self, micro: list[int]) -> LogitsOf:
        """Run the current policy on a micro-batch, without gradient; each micro-batch once."""
        if self._measured is None:
            self._measured = self._runner("student", self.running, self._own)
        with self.policy.in_force(self._own):
            hidden, head = self._measured.run(micro, self.with_head(_hidden_and_head))
            self._measured.done(micro)
        return lambda part, buffers: TokenLogits.of(hidden[part], head, self.temperature, buffers)

    def _target(self, output: TeacherOutput, student: Callable[[], LogitsOf]) -> LogitsOf:
        """The teacher's target, from its weights' logits and, if its rule asks, the student's."""

        def logits(part: slice, buffers: Buffers) -> TokenLogits:
            tables = output.logits(part, self.temperature, buffers)
            models = tuple(TokenLogits(table, buffers) for table in tables)
            return output.combine(lambda: student()(part, buffers), models)

        return logits

    def _read(self, number: int, logits: LogitsOf, student: LogitsOf | None = None) -> Tensor:
        """[3, N] float64, nats: log-probs of a micro-batch's tokens, entropies, and the KL
        divergence to the student; 0 without a student.
        """
        ids = self.of_tokens(number, self.batch.ids)
        values, buffers = ids.new_zeros((3, len(ids)), dtype=torch.float64), Buffers()
        for part in chunks(len(ids), self.policy.vocabulary, ids.device):
            buffers.recycle()
            here = logits(part, buffers)
            values[0, part], values[1, part] = here.logprob(ids[part]), here.entropy()
            if student is not None:
                far = here.log_probs - student(part, buffers).log_probs
                values[2, part] = (here.probs * far).sum(-1).double()
        return values

    def _objective(
        self,
        number: int,
        student: LogitsOf,
        outputs: Mapping[str, TeacherOutput],
        signals: Signals,
    ) -> Tensor:
        """[N]: the objective of the plan's credit at the micro-batch's tokens."""
        ids, places = self.of_tokens(number, self.batch.ids), self.places(number)
        rollouts = self.rollouts(number)
        values, buffers = torch.zeros_like(ids, dtype=torch.float64), Buffers()

        def seen(part: slice) -> Chunk:
            made = student(part, buffers)

            def of(slot: str) -> Callable[[], TokenLogits]:
                target = self._target(outputs[slot], lambda: lambda part, buffers: made)
                return cache(partial(target, part, buffers))

            return Chunk(
                student=made,
                teacher=of("teacher"),
                reference=of("reference"),
                others=tuple(map(of, self.others)),
                ids=ids[part],
                logprob=made.logprob(ids[part]),
                places=places[part],
                rollouts=frozenset(rollouts[part]),
                signals=signals,
            )

        for part in chunks(len(ids), self.policy.vocabulary, ids.device):
            buffers.recycle()
            values[part] = self.batch.plan.credit(seen(part)).objective.double()
        return values


def _hidden_and_head(hidden: Tensor, linear: nn.Linear, head: Head) -> tuple[Tensor, Head]:
    return hidden, head
