"""The step, from a judged batch to the optimizer's step; read it from top to bottom.

OptimizerSteps.learn        the optimizer steps on one batch
  OptimizerSteps._take      one of them: backward, clip, step; or skipped, counted and said
    Update.losses           tables, token weights, and the loss of each micro-batch
      Forwards              which rows run in which micro-batches, for student and teachers
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

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
from scsdpo.metrics import GapCheck, PhaseTimer, age_metrics, log_figures, token_metrics
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
from scsdpo.training.budget import REMEDY, Budget, OutOfMemory, agreed, noticed
from scsdpo.training.finite import all_zero, not_finite_because, total_norm, weight_norm
from scsdpo.training.run_checks import is_plateau
from scsdpo.types import stable_hash
from scsdpo.weighting import TokenWeighting

T = TypeVar("T")
LogitsOf = Callable[[slice, Buffers], TokenLogits]
"""Slice of a micro-batch's tokens -> their logits, made in the buffers."""

IDLE_WARNING = 10
"""Batches in a row without anything to learn from after which that is said."""
NO_CREDIT = "every rollout has weight 0 or no credit, as where all of a group are equally right"
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
_CUT = "raise model.sampling.max_new_tokens, or see in `scsdpo predict` why responses do not end"
_SHOWN_IDLE = ("pass_rate", "truncated")
LARGEST_GROWTH = 1e3
"""Of the weights' norm in one step: more has destroyed what they were."""
OBJECTIVE_OF_TABLES = (
    "the objective is measured before the loss, and cannot itself depend on measured tables: "
    "choose an advantage that reads none, or other token weights"
)


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Limits:
    """Bounds on a step's gradient and memory, and on steps and batches that achieve nothing.

    Args:
        max_grad_norm: clip on the gradient's norm. inf: none.
        max_tokens: distinct tokens whose activations are in memory at a time; `auto` measures
            how many fit. It changes memory and speed, and no number.
        max_bad_steps: non-finite steps in a row after which the run stops.
        max_idle_batches: batches in a row without anything to learn from after which it stops:
            they take no step, so that `trainer.max_steps` alone would wait for ever.

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
        """Tokens at a time, as memory is now."""
        return policy.token_budget() if self.max_tokens == "auto" else self.max_tokens


class Sampled(NamedTuple):
    """What is known of a micro-batch's N tokens since they were sampled."""

    logprob: Tensor
    """[N] the sampler's log S(y), of the whole distribution; nan: not known."""
    age: Tensor
    """[N, 2] int32: `Batch.ages`."""

    @property
    def of_present_weights(self) -> Tensor:
        """[N] `logprob` where the weights before the batch's first update drew the token, else nan:
        what the trainer's own is to agree with.
        """
        return self.logprob.where(self.age[:, 0] == 0, torch.nan)


def trained_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer moves."""
    return [p for p in policy.parameters() if p.requires_grad]


def without_all_reduce(trainer: L.Trainer) -> AbstractContextManager[Any]:
    """Let DDP's backward make no all-reduce of its own.

    `sum_gradients` makes the only one, so that ranks may run different numbers of micro-batches.
    """
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()


class OptimizerSteps(nn.Module):
    """The optimizer steps on a batch: split, accumulate, clip, step or skip, count, report.

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
        prefix: of its figures in the log.
        counts: whether strategies that remember count its steps (`Stateful.after_step`).
    """

    skipped: Tensor
    """Steps that were not taken, in all."""
    bad: Tensor
    """Non-finite steps in a row."""
    idle: Tensor
    """Batches in a row without anything to learn from."""

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
        """Whether weights, optimizer and teachers are between two steps' states."""
        self._broken = ""
        self._norm: float | None = None
        for name in ("skipped", "bad", "idle"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def learn(self, host: L.LightningModule, policy: CausalLM, batch: Batch) -> None:
        """All optimizer steps on `batch`.

        Args:
            host: the `PolicyOptimizer`: gives optimizer, schedule, backward and log.
            policy: is run, and gets the gradient.
            batch: what is learned from.

        Raises:
            TrainingStopped: if a limit on steps that achieve nothing is reached, or the sampler
                disagrees with the trainer.
        """
        update = replace(self.update, observe=recorded(host).recorder.take_observer())
        unmeasured, later = batch, [row for rows in batch.steps[1:] for row in rows]
        if later:  # their ratios are to the policy before the first step
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
        """One optimizer step on `rows`: backward, clip, step; or why it is not taken."""
        (index,) = upload([torch.tensor(rows)], host.device)
        here = batch.active[index]
        trained = torch.stack([here.sum(), (here * batch.sampled[index].sum(-1)).sum()])
        active, tokens = all_sum(trained).tolist()
        if active == 0:
            self._idle(host, policy, batch, NO_CREDIT)
            return
        with update.timer("student"):  # from its start with fewer tokens if memory runs out
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
        # Later steps on a batch: the sampler's weights are those before the first of them.
        if first:
            pairs = [(output.logprob, sampled.of_present_weights) for output, sampled in outputs]
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
    ) -> tuple[Tensor, list[tuple[LossOutput, Sampled]]]:
        """Backward of all micro-batches: the loss here, and of each micro-batch the kernel's output
        and what the sampler said. Nothing of an attempt that memory did not suffice for is left.
        """
        for parameter in trained_parameters(policy):
            parameter.grad = None
        loss = torch.zeros((), dtype=torch.float64, device=host.device)
        outputs = []
        apart = without_all_reduce(host.trainer)
        devices = [host.device] if host.device.type == "cuda" else []
        with agreed(policy), apart, torch.random.fork_rng(devices=devices):
            # Dropout draws by the run's seed, step and rank, also in a run that was resumed.
            torch.manual_seed(stable_hash(run_seed(), host.trainer.global_step, host.global_rank))
            for output, sampled in update.losses(policy, batch, rows, max_tokens):
                interrupt.check()
                host.manual_backward(output.loss)
                loss += output.loss.detach().double()
                outputs.append((output, sampled))
        return loss, outputs

    def _move(
        self,
        host: L.LightningModule,
        policy: CausalLM,
        optimizer: LightningOptimizer,
        norm: Tensor,
    ) -> None:
        """Clip, the optimizer's step and all that follows from it; the weights must survive it."""
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
        schedule: Any = host.lr_schedulers()
        if not is_plateau(schedule):  # which is stepped by `after_validation`
            try:
                schedule.step()
            except Exception as error:  # ends the run once the state is whole and can be saved
                name = type(schedule).__name__
                self._broken = f"model.lr_scheduler: {name}: {first_line(error)}"
        self.update.teacher.after_step(policy)
        self.update.reference.after_step(policy)
        for part in host.modules() if self.counts else ():
            if isinstance(part, Stateful):
                part.after_step()
        self.under_way = False

    def _idle(self, host: L.LightningModule, policy: CausalLM, batch: Batch, reason: str) -> None:
        """Count a step that has nothing to learn from; say it after a while, then stop."""
        self.skipped += 1
        self.idle += 1
        log_figures(host, self.prefix, {"skipped": float(self.skipped)})
        if self.idle == IDLE_WARNING:
            responses = batch.judged.responses
            mean = float(responses.policy_logprobs[responses.sampled].double().mean())
            rank_zero_warn(
                f"{IDLE_WARNING} batches in a row had nothing to learn from (the last: {reason}). "
                f"The mean log-prob of its tokens is {mean:.2f}; a policy that samples noise has "
                f"{-math.log(policy.vocabulary):.2f}"
            )
        if self.idle >= self.limits.max_idle_batches:
            logged = host.trainer.callback_metrics
            rate, cut = (float(logged[f"{self.prefix}/{name}"]) for name in _SHOWN_IDLE)
            raise TrainingStopped(
                f"{int(self.idle)} batches in a row had nothing to learn from "
                f"(model.limits.max_idle_batches; pass rate {rate:.2f}, {cut:.0%} of the responses "
                f"truncated): {_CUT if cut > 0.5 else REMEDIES[reason]}"
            )

    def _skip(self, host: L.LightningModule, why: str, *, of_weights: bool) -> None:
        """Count a step whose loss or gradient is not finite; stop where no later one can be."""
        if of_weights:
            raise TrainingStopped(f"{why}; go on from an older checkpoint")
        self.bad += 1
        self.skipped += 1
        rank_zero_warn(f"step skipped, not finite: {why}")
        log_figures(host, self.prefix, {"skipped": float(self.skipped)})
        if self.bad >= self.limits.max_bad_steps:
            raise TrainingStopped(
                f"{int(self.bad)} steps in a row were not finite (last: {why}); the weights "
                "are those before the first of them. Lower the learning rate, or check the data"
            )

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


@dataclass(frozen=True, kw_only=True)
class Update:
    """The losses with a gradient of some rows of a batch, micro-batch by micro-batch.

    Args:
        teacher: asked where the plan needs it.
        reference: the same, for the anchor.
        token_weighting: factor on each token.
        reduction: how tokens add up; denominators are those of the whole optimizer step.
        importance: factor on each token from the sampler's log-probs.
        needs: fields of `Signals` that the strategies ask for: a pass without gradient fills them.
        derivations: tables that strategies make of them.
        observe: called by the kernel with each block's credit; for looking, changes nothing.
        timer: told when a teacher runs.
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
    ) -> Iterator[tuple[LossOutput, Sampled]]:
        """Per micro-batch of the active ones among `rows`, its share of the step's loss and what
        the sampler said. The caller runs backward on each before asking for the next. There
        is none where every token of all ranks weighs 0.

        Args:
            policy: is run, and gets the gradient.
            batch: the rollouts and what is known of them.
            rows: those of this optimizer step.
            max_tokens: tokens whose activations are alive at a time. It changes memory and speed,
                and no number.
        """
        forwards = self._forwards(policy, batch, rows, max_tokens)
        with agreed(policy):  # collectives follow
            signals = forwards.tables(self.needs)
        for make in (*batch.plan.derivations, *self.derivations):
            signals.derive(make)

        # [R]: question weight / denominator of every rollout.
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
            of_sampler = Sampled(
                logprob=forwards.of_tokens(number, sampler), age=forwards.of_tokens(number, ages)
            )
            forwards.forget(number)
            credit = partial(credit_loss, tokens=tokens, objective=objective, gradient=gradient)
            loss = partial(forwards.with_experts, number, credit)
            output = forwards.student.run(micro, forwards.with_head(loss))
            yield output, of_sampler
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
        with agreed(policy):
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
    """Weights, and the context that they read."""

    weights: Weights
    context: Context
    slots: list[str]
    """The slots that read it: `teacher`, `teacher/NAME`, `reference`."""
    reads: Tensor
    """[R] bool, of the host: rows that one of them reads."""
    runs: list[bool] = field(default_factory=list)
    """By micro-batch, whether it runs; under shards on all ranks, if on any."""
    made: dict[int, tuple[Tensor, Head] | None] = field(default_factory=dict)
    """By number of the micro-batch, hidden states [N, D] and head; None: no row here reads it."""
    runner: Runner | None = None


class Forwards:
    """Which rows of a step run, in which micro-batches, and what the models say of them.

    The host waits for the device once, at the start, and knows all rows and places from then on.

    Args:
        policy: the student, and whose weights the teachers' may be.
        teachers: by slot, `teacher`, `teacher/NAME` and `reference`.
        batch: the rollouts and what is known of them.
        rows: those of this optimizer step; the active ones of them are run.
        max_tokens: tokens whose activations are alive at a time.
        timer: told when a teacher runs.
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
        """[R] bool: the rows whose credit reads them."""
        self.others = [slot for slot in batch.contexts if slot.startswith("teacher/")]
        """The teacher's further contexts, in order."""
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
        """[R] bool, of the host: the rows that are run."""
        self.index, chosen = upload([step, self.running.long()], batch.ids.device)
        self.chosen = chosen.bool()
        """[R] bool: the same on the device."""
        self._places: dict[int, Tensor] = {}
        self.temperature = batch.judged.responses.temperature
        noted = batch.judged.responses.experts
        self._experts = noted.flatten(0, 1)
        """[R, L, layers, k] the sampler's; layers is 0 if it says none."""
        learned = (self.running & self._sampled.any(-1)).sum()
        self._learned = max(float(all_sum(learned.double())), 1.0)
        """Responses that are run, of all ranks."""
        self._watches = policy.expert_balance > 0 or noted.shape[-2] > 0
        self.student = self._runner("student", self.running, watches=self._watches)
        """With a gradient; each micro-batch once."""
        self.micro_batches = self.student.micro_batches()
        self._heads: dict[nn.Linear, Head] = {}
        self._own = policy.adapter.current()
        self._measured: Runner | None = None
        self._pairs = self._paired()

    def _paired(self) -> list[_Pair]:
        """Each pair of weights and context that some slot reads, once.

        Slots that read the same pair share its forwards. Whether two pairs are the same is told by
        weights and contexts, and not by what was rendered: it is the same on every rank.
        """
        pairs: list[_Pair] = []
        for slot, reads in self._read_by.items():
            teacher = self.teachers[slot]
            parts = teacher.context.named
            name = slot.partition("/")[2]
            context = parts[name] if name in parts else next(iter(parts.values()))
            for weights in teacher.trunks(self.policy):
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
        """Distinct tokens of the wanted rows [R], with the slot's prompts."""
        rows = wanted.nonzero()[:, 0].tolist()
        return self._rows[slot].at(rows).distinct_tokens if rows else 0

    def rollouts(self, number: int) -> list[int]:
        """[N] the row of each of the micro-batch's sampled tokens, row-major."""
        micro = self.micro_batches[number]
        counts = self._sampled[micro].sum(-1).tolist()
        return [row for row, count in zip(micro, counts, strict=True) for _ in range(count)]

    def places(self, number: int) -> Tensor:
        """[N] int64: flat index of these tokens into tables [R, L], for rows ascend."""
        if number not in self._places:
            here = torch.zeros_like(self._sampled)
            here[self.micro_batches[number]] = self._sampled[self.micro_batches[number]]
            flat = here.flatten().nonzero()[:, 0]
            (self._places[number],) = upload([flat], self.batch.ids.device)
        return self._places[number]

    def of_tokens(self, number: int, table: Tensor) -> Tensor:
        """[N, ...]: the entries of `table` [R, L, ...] at these tokens."""
        return table.flatten(0, 1).index_select(0, self.places(number))

    def _write(self, number: int, table: Tensor, values: Tensor) -> None:
        """Put `values` [N] into `table` [R, L] at these tokens."""
        table.view(-1).index_copy_(0, self.places(number), values)

    def with_head(
        self, use: Callable[[Tensor, nn.Linear, Head], T]
    ) -> Callable[[Tensor, nn.Linear], T]:
        """`use`, which also wants the head in the dtype of its product: cast once a step."""

        def used(hidden: Tensor, linear: nn.Linear) -> T:
            if linear in self._heads:
                return use(hidden, linear, self._heads[linear])
            head = Head.of(linear).first(self.policy.vocabulary)
            kept = not isinstance(linear, WideHead)  # that is another one in each forward
            # What needs no cast FSDP2 frees with the forward.
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
        """The credit loss, the load-balancing loss of experts, and whether experts differ."""
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
        """What a slot's teacher says of a micro-batch; nothing where nobody there reads it.

        A pair runs once, whichever slot asks first, and keeps what it said until `forget`. Rows
        that nobody reads keep zeros: uniform logits, and no credit reads them.
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
                hidden, head = pair.runner.run(some, self.with_head(_both))
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
        """Let go what teachers said of a micro-batch, and its places."""
        self._places.pop(number, None)
        for pair in self._pairs:
            pair.made.pop(number, None)

    def _placed(self, number: int, hidden: Tensor, some: Sequence[int]) -> Tensor:
        """[N, D]: `hidden` at the micro-batch's tokens of the rows `some`, zeros elsewhere."""
        rollouts, wanted = self.rollouts(number), set(some)
        here = [i for i, row in enumerate(rollouts) if row in wanted]
        if len(here) == len(rollouts):
            return hidden
        (index,) = upload([torch.tensor(here, dtype=torch.long)], hidden.device)
        return hidden.new_zeros((len(rollouts), *hidden.shape[1:])).index_copy_(0, index, hidden)

    # ---------------------------------------------------- tables, before the loss and without grad

    @torch.no_grad()
    def tables(self, needs: Set[str]) -> Signals:
        """The signals of every row of the step. A teacher that runs here is not run again.

        Args:
            needs: fields of `Signals` to fill; the others, and rows that do not run, keep zeros.

        Raises:
            ConfigurationError: if the objective is asked for, and depends on tables itself.
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
        # Under shards the student must run where a teacher may ask for it on some rank.
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
        """The current policy on a micro-batch, without gradient; each micro-batch once."""
        if self._measured is None:
            self._measured = self._runner("student", self.running, self._own)
        with self.policy.in_force(self._own):
            hidden, head = self._measured.run(micro, self.with_head(_both))
            self._measured.done(micro)
        return lambda part, buffers: TokenLogits.of(hidden[part], head, self.temperature, buffers)

    def _target(self, output: TeacherOutput, student: Callable[[], LogitsOf]) -> LogitsOf:
        """The target that a teacher makes of its weights' logits and, if it asks, the student's."""

        def logits(part: slice, buffers: Buffers) -> TokenLogits:
            tables = output.logits(part, self.temperature, buffers)
            models = tuple(TokenLogits(table, buffers) for table in tables)
            return output.combine(lambda: student()(part, buffers), models)

        return logits

    def _read(self, number: int, logits: LogitsOf, student: LogitsOf | None = None) -> Tensor:
        """[3, N] log-probs and entropies of a micro-batch's tokens, and KL to the student; without
        one, zeros.
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
        """[N]: the objective of the plan's credit at a micro-batch's tokens."""
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


def _both(hidden: Tensor, linear: nn.Linear, head: Head) -> tuple[Tensor, Head]:
    return hidden, head
