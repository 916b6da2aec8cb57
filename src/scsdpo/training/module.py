"""The LightningModule that samples, judges and learns, composed of strategies."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from scsdpo import interrupt
from scsdpo.advantage import Advantage, Batch
from scsdpo.callbacks import Progress, RunRecords, show_batch
from scsdpo.checkpoints import (
    Change,
    SafePoint,
    count_batches,
    fit_weights,
    take_back,
    under_way,
    write_whole_files,
)
from scsdpo.data import TaskDataModule
from scsdpo.data.rendered import rendered
from scsdpo.data.startup import check_context
from scsdpo.distributed import AbortVote, rank_and_size
from scsdpo.errors import ConfigurationError, TrainingStopped, blamed_on
from scsdpo.health import Health
from scsdpo.loss import Importance, NoImportance, Observer, unobserved
from scsdpo.metrics import GapCheck, log_figures, phase_metrics, rollout_metrics
from scsdpo.planning import MemoryPlan
from scsdpo.policy import CausalLM
from scsdpo.policy.adapter import leave_out_of_ddp
from scsdpo.policy.sharding import flat_mesh
from scsdpo.records import MetricsFile, Recorder, guard_logger
from scsdpo.reduction import Reduction, SequenceMean
from scsdpo.rollout import Drawing, HFRollout, Rollout
from scsdpo.selection import Everything, Selection
from scsdpo.state import Stateful, memory
from scsdpo.teacher import External, NoTeacher, Teacher, contexts_of
from scsdpo.training.ahead import Ahead, DrawnAhead, check_ahead
from scsdpo.training.balancing import balance_ranks, split
from scsdpo.training.collector import Collector
from scsdpo.training.evaluation import Evaluation, EvaluationFiles, GatheredWeights
from scsdpo.training.finite import non_finite_anywhere
from scsdpo.training.on_failure import OnFailure
from scsdpo.training.run_checks import (
    check_course,
    check_settings,
    made,
    make_schedule,
    say_what_ended,
)
from scsdpo.training.self_check import check_model
from scsdpo.training.step import Limits, OptimizerSteps, trained_parameters
from scsdpo.training.strategies import Strategies
from scsdpo.training.teacher_gain import (
    DemonstratingContext,
    TeacherGain,
    demonstrating_context,
    measure_teacher_gain,
)
from scsdpo.training.trace import BatchTrace, trace_update
from scsdpo.training.warmup import Warmup, WarmupStage
from scsdpo.types import Judged, Moment, Prompt, Responses, Sampling
from scsdpo.verifiers import Verification
from scsdpo.weighting import TokenWeighting, Uniform, UniformTokens, Weighting


class PolicyOptimizer(L.LightningModule):
    """Self-distillation policy optimization, composed of strategies.

    For each batch of questions the policy samples responses, verifiers judge them, and the policy
    learns from them:

        responses = rollout.sample(policy, prompts, sampling)
        judged    = judge(responses)
        contexts  = teacher.contexts(chat, judged)
        weights   = weighting.weigh(judged)
        plan      = advantage.plan(judged, contexts.available)
        loss      = sum_t reduction * weight * token weight * importance * objective_t

    Args:
        policy: the language model that is trained.
        advantage: the credit of each vocabulary entry at each position.
        teacher: weights and context of a distribution that knows more.
        weighting: how much each question and rollout counts.
        rollout: the sampler of responses.
        selection: which judged groups are learned from, and when: `Everything()`, or
            `InformativePool` (DAPO).
        token_weighting: how much each token counts.
        reduction: how token losses add up.
        importance: correction for the sampler's distribution.
        reference: a second teacher, for anchors.
        gap: how far the log-probs of sampler and trainer may differ.
        sampling: how training responses are drawn; `n` is the group size G.
        val_sampling: how validation responses are drawn; `n` is k of mean@k and maj@k.
        verification: how responses are judged: processes and deadlines.
        optimizer: made from the trainable parameters.
        lr_scheduler: stepped once per optimizer step taken; Lightning's `ReduceLROnPlateau`, which
            names its `monitor`, after each validation.
        updates_per_rollout: optimizer steps on one batch of rollouts, split by question.
        success_threshold: a rollout with at least this reward is a success. The success with the
            highest reward is shown to teachers.
        limits: clip of the gradient, budget of a micro-batch, and when the run stops in vain.
        ahead: batches that are sampled before they are learned from.
        warmup: supervised steps at the start, which teach the policy to use its teacher's prompt,
            and the check that it can.

    Raises:
        ConfigurationError: if the strategies do not fit together.
    """

    batches: Tensor
    """Batches of training questions since the run began. A batch may take no optimizer step."""

    def __init__(
        self,
        policy: CausalLM,
        advantage: Advantage,
        teacher: Teacher = NoTeacher(),
        weighting: Weighting = Uniform(),
        rollout: Rollout = HFRollout(),
        selection: Selection = Everything(),
        token_weighting: TokenWeighting = UniformTokens(),
        reduction: Reduction = SequenceMean(),
        importance: Importance = NoImportance(),
        reference: Teacher = NoTeacher(),
        gap: GapCheck = GapCheck(),
        sampling: Sampling = Sampling(),
        val_sampling: Sampling = Sampling(n=16, temperature=0.6, top_p=0.95),
        verification: Verification = Verification(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        # Constant. No other schedule has its argument, so that none of them inherits it in YAML.
        lr_scheduler: LRSchedulerCallable = lambda o: torch.optim.lr_scheduler.LinearLR(
            o, start_factor=1.0
        ),
        updates_per_rollout: int = 1,
        success_threshold: float = 1.0,
        limits: Limits = Limits(),
        ahead: Ahead = Ahead(),
        warmup: Warmup = Warmup(),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not saved; `on_load_checkpoint` is strict
        self.policy, self.teacher, self.reference = policy, teacher, reference
        self.rollout, self.selection = rollout, selection
        self.advantage, self.weighting = advantage, weighting
        self.sampling, self.val_sampling = sampling, val_sampling.seeded(0)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.updates_per_rollout = updates_per_rollout
        self.success_threshold, self.limits = success_threshold, limits
        self.ahead, self.drawn_ahead = ahead, DrawnAhead(ahead)
        strategies = Strategies(
            teacher=teacher,
            reference=reference,
            advantage=advantage,
            weighting=weighting,
            token_weighting=token_weighting,
            reduction=reduction,
            importance=importance,
            selection=selection,
        )
        strategies.check(
            group=sampling.n,
            updates_per_rollout=updates_per_rollout,
            warms_up=warmup.steps > 0,
        )
        if warmup.steps:
            warmup.check_teachers(teacher, reference)
        for slot, each in (("teacher", teacher), ("reference", reference)):
            with blamed_on(f"model.{slot}"):
                each.check(policy)
        # A wrong argument fails here, before the weights are loaded.
        probe = made("model.optimizer", lambda: optimizer([nn.Parameter(torch.zeros(1))]))
        made("model.lr_scheduler", lambda: lr_scheduler(probe))
        self.steps = OptimizerSteps(
            strategies.update(),
            limits=limits,
            gap=gap,
            objective_name=advantage.objective_name,
        )
        self.timer = self.steps.update.timer
        self.collector = Collector(rollout, verification, success_threshold, self.timer)
        self.evaluation = Evaluation(self.collector)
        self.teacher_check = warmup.check
        self.warmup: WarmupStage | None = None
        if warmup.steps:
            self.warmup = WarmupStage(
                warmup, teacher=teacher, reference=reference, limits=limits, timer=self.timer
            )
        self.weightings = strategies.weightings()
        self.memory = memory(self, strategies.remembering())
        self._configured = False
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.recorder, self.safe_point = Recorder(), SafePoint()
        self.changed: Sequence[Change] = ()
        """Changes of the configuration since the checkpoint that will be loaded."""
        self.policy_only = False
        """True where a checkpoint is loaded for its policy alone, and training starts anew."""

    def configure_callbacks(self) -> list[L.Callback]:
        """The callbacks of every run, but for those that the trainer has already.

        Loggers are guarded here, before they open their files: a failing one does not end the run.
        """
        self.rollout.check_installed()
        for logger in self.trainer.loggers:
            guard_logger(logger)
        if self.trainer.state.fn == "fit":
            check_settings(self.trainer, self)
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        own = (
            *(MemoryPlan(), Progress(), Health(), MetricsFile(), RunRecords()),
            *(EvaluationFiles(self.evaluation), OnFailure(), GatheredWeights()),
        )
        return [one for one in own if not any(isinstance(each, type(one)) for each in given)]

    def setup(self, stage: str) -> None:
        """Check the settings against the data, and start the processes that judge.

        Raises:
            ConfigurationError: if the longest prompt leaves the sampler no room for a response, or
                schedule, validations and monitors do not fit the length of the run.
        """
        write_whole_files(self.trainer, resumes=stage == "fit")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            overfits = bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]
            check_ahead(self.ahead, self.rollout, data, overfits, self.steps.update.importance)
        if isinstance(data, TaskDataModule):
            most = data.max_prompt_tokens
            if stage == "fit":
                self.collector.check_room("sampling", self.sampling, most)
                longest = max(source.longest for source in data.train_set.sources)
                check_context(self, data.train_sources[0], longest)
            self.collector.check_room("val_sampling", self.val_sampling, most)
        if stage == "fit":
            check_course(self.trainer, self)
        self.collector.verifiers.start()

    def configure_model(self) -> None:
        """Load the policy's weights, then the teachers'; a second call does nothing."""
        if self._configured:
            return
        mesh = flat_mesh(self)
        with blamed_on("model.policy"):
            self.policy.configure_model(to_shard=mesh is not None)
        self.teacher.configure(self.policy, "teacher")
        self.reference.share(self.teacher)
        self.reference.configure(self.policy, "reference")
        if mesh is not None:
            self.policy.fill_shards(mesh, self.modules())
        leave_out_of_ddp(self)
        self.weightings.configure(self.policy)
        self._configured = True

    def configure_optimizers(self) -> Any:
        """One optimizer and its schedule.

        Raises:
            ConfigurationError: if a trainable parameter is not float32, or checkpoints cannot hold
                the optimizer's state.
        """
        parameters = trained_parameters(self.policy)
        wrong = {p.dtype for p in parameters} - {torch.float32, torch.float64}
        if wrong:
            raise ConfigurationError(
                f"trainable parameters must be float32, got {wrong.pop()}: a bf16 weight of 0.02 "
                "does not move at lr 1e-5; use `trainer.precision: bf16-mixed`, or model.policy "
                "with adapter Lora and dtype auto"
            )
        optimizer = self.optimizer(parameters)
        if type(optimizer).__module__.partition(".")[0] == "torchao":
            raise ConfigurationError(
                f"model.optimizer: torchao's {type(optimizer).__name__} is not supported, because "
                "its quantised states cannot be loaded from a checkpoint: use torch.optim.AdamW. "
                "If its 8 bytes a parameter do not fit, shard the weights (configs/scale)"
            )
        return {"optimizer": optimizer, "lr_scheduler": make_schedule(self, optimizer)}

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """From here on a signal stops the run at its next safe point. Check the model."""
        interrupt.begin_run(AbortVote.of_ranks())
        teachers = {"teacher": self.teacher, "reference": self.reference}
        check_model(self, self.policy, teachers, self.rollout, self.sampling, self.steps.gap)

    def on_train_start(self) -> None:
        """The state before the first batch can be saved from now on."""
        self.drawn_ahead.begin(self.trainer.global_step)
        self.safe_point.keep(self)

    def on_train_batch_start(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """Check the batch. A signal that comes before its first step makes the run drop it.

        Raises:
            ConfigurationError: if the batch has fewer questions than optimizer steps.
            TrainingStopped: if the learning rate's schedule has failed.
        """
        count_batches(self.trainer)
        if len(prompts) < self.updates_per_rollout:
            raise ConfigurationError(
                f"model.updates_per_rollout={self.updates_per_rollout} needs at least as many "
                f"questions per batch, got {len(prompts)}: raise data.questions_per_batch"
            )
        self.steps.stop_if_broken()
        interrupt.open_window()

    def training_step(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """One batch of questions: sample, judge, select, prepare, learn."""
        self.batches += 1
        if self._warms_up(prompts):
            return
        judged = self.judge(self.drawn(prompts))
        interrupt.meet()
        prepared = [self.prepare(chosen) for chosen in self.selection.select(judged)]
        shares = [balance_ranks(each, self.advantage, self.teacher) for each in prepared]
        weights = torch.cat([judged.rewards[:0].double(), *(batch.weights for batch in shares)])
        log_figures(self, "train", rollout_metrics(judged, weights), shown="pass_rate")
        for batch in shares:
            self.observe(batch.judged)
            show_batch(self, batch)
            self.steps.learn(self, self.policy, batch)
        log_figures(self, "train", phase_metrics(self.timer, self.device))

    def _warms_up(self, prompts: Sequence[Prompt]) -> bool:
        """Take a step of the warm-up, if that is not over; True if it did.

        Before the first batch behind the warm-up `TeacherCheck` judges the gain that the policy has
        from its teacher's context.
        """
        gain: TeacherGain | None = None
        if self.warmup is not None and not self.warmup.over:
            context, count = self.warmup.context, self.warmup.settings.questions
            if self.warmup.goes_on(self, partial(self._measure_gain, context, count, prompts)):
                self.warmup.step(self, prompts)
                log_figures(self, "train", phase_metrics(self.timer, self.device))
                return True
            gain = self.warmup.last
        elif int(self.batches) == 1:
            gain = self._gain_before_training(prompts)
        if gain is not None and self._learns_from_itself_alone():
            self.teacher_check.judge(gain)
        return False

    def _learns_from_itself_alone(self) -> bool:
        """True if all credit comes from a teacher that has the policy's own weights."""
        own = self.teacher.exists and not isinstance(self.teacher, External)
        return own and self.advantage.needs_teacher and not self.advantage.needs_group

    def _gain_before_training(self, prompts: Sequence[Prompt]) -> TeacherGain | None:
        """The teacher's gain; None if it does not matter, or the run is too short to measure it."""
        context = demonstrating_context(self.teacher.context)
        own = self._learns_from_itself_alone()
        if context is None or not own or self.policy.name_or_path == "tiny":
            return None
        batches = self.trainer.estimated_stepping_batches / self.updates_per_rollout
        planned = batches * len(prompts) * rank_and_size()[1]
        if not (count := self.teacher_check.affordable(planned, context)):
            return None
        return self._measure_gain(context, count, prompts, "check", "before the first step")

    def _measure_gain(
        self,
        context: DemonstratingContext,
        count: int,
        prompts: Sequence[Prompt],
        name: str,
        when: str,
    ) -> TeacherGain:
        """Measure the teacher's gain on training questions, log it and print it.

        Args:
            context: shows a demonstration.
            count: number of questions, over all ranks.
            prompts: the batch's questions.
            name: name of this measurement; the part before a slash is the prefix of its figures.
            when: when it is made, in words.
        """
        room = self.collector.prompt_room(self.sampling)
        asked = self._questions_to_measure(count, prompts)
        gain = measure_teacher_gain(self, context, asked, name, room)
        self.timer.take()  # the time of this measurement belongs to no step
        log_figures(self, name.partition("/")[0], gain.figures())
        rank_zero_info(f"{when}: {gain}")
        return gain

    def _questions_to_measure(self, count: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The training questions that this rank measures, the same ones each time.

        Args:
            count: number of questions over all ranks; each rank has at least one.
            prompts: the batch's questions, which are used if the data are not a `TaskDataModule`'s.
        """
        rank, ranks = rank_and_size()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TaskDataModule):
            return [*prompts[: -(-count // ranks)]]
        chat, most = self.policy.chat, data.max_prompt_tokens
        every = [rendered(prompt, chat) for prompt in data.some(max(count, ranks), "teacher gain")]
        short = [prompt for prompt in every if len(prompt.ids) <= most]
        return short[rank::ranks] or [*prompts[:1]]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is finished, and the state after it can be saved."""
        self.drawn_ahead.finish(self.trainer.global_step)
        self.safe_point.keep(self)

    def drawn(self, prompts: Sequence[Prompt]) -> Responses:
        """Responses to the questions of this batch, sampled now or ahead."""
        if not self.ahead.batches:
            return self.sample(prompts, self.sampling.at(int(self.batches)))
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        step = self.trainer.global_step
        due = self.drawn_ahead.responses(self, prompts, data.upcoming, step)
        log_figures(self, "train", {"asked_again": self.drawn_ahead.asked_again})
        return due.to(self.device)

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> Drawing:
        """Ask for responses of the present policy; wait only where they cannot be drawn beside."""
        within = self.ahead.within_responses
        return self.collector.begin(self, self.policy, prompts, sampling, within=within)

    def finish(self, drawing: Drawing) -> Responses:
        """Wait for the responses that `begin` asked for."""
        return self.collector.finish(self, drawing)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        """Sample responses of the present policy."""
        return self.collector.sample(self, self.policy, prompts, sampling)

    def judge(self, responses: Responses) -> Judged:
        """Verdicts by each prompt's verifier; failures of verifiers are logged."""
        return self.collector.judge(responses, "train")

    def prepare(self, judged: Judged) -> Batch:
        """Make contexts, weights and plan: everything before the first forward. Changes nothing."""
        contexts = contexts_of(self.teacher, self.reference, self.policy.chat, judged)
        available = self.teacher.available(contexts).to(judged.rewards.device)
        old = judged.responses.drawn_at  # empty where nothing is sampled ahead
        return Batch.of(
            judged,
            self.advantage.planned(judged, available.view_as(judged.successes)),
            self.weighting.weights(judged),
            contexts,
            split(len(judged.rewards), self.updates_per_rollout),
            self.advantage.objective_name,
            self.drawn_ahead.now(self.trainer.global_step) if old else Moment(0, 0),
        )

    def observe(self, judged: Judged) -> None:
        """Let every stateful strategy observe a batch; called once a batch."""
        for part in self.modules():
            if isinstance(part, Stateful):
                part.observe(judged)

    def trace(self, prompts: Iterable[Prompt], *, observe: Observer = unobserved) -> BatchTrace:
        """Sample, judge and compute the loss of one batch, and return the credit of each token.

        It needs no Trainer, takes no step and changes neither weights nor stateful strategies. With
        `InformativePool` the batch's own informative groups are traced.

        Args:
            prompts: the questions of one batch, as a data source yields them.
            observe: is called with each block of tokens and its credit over the whole vocabulary.

        Returns:
            Rollouts, verdicts, contexts, weights, and tables [Q, G, L] of each token's credit.
        """
        self.configure_model()
        chat = self.policy.chat
        asked = [p if p.ids else rendered(p, chat) for p in prompts]
        responses = self.sample(asked, self.sampling.at(int(self.batches) + 1))
        batch = self.prepare(self.selection.preview(self.judge(responses)))
        budget = self.limits.token_budget(self.policy)
        update = self.steps.update
        return trace_update(update, self.policy, batch, max_tokens=budget, observe=observe)

    def on_train_end(self) -> None:
        """Print which limit ended the run."""
        say_what_ended(self.trainer, self)

    # ---------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Begin a new evaluation."""
        self.evaluation.begin()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """Sample with `val_sampling` and judge."""
        self.evaluation.step(self, self.policy, prompts, self.val_sampling, "val")

    def on_validation_epoch_end(self) -> None:
        """Log mean@k and maj@k, overall and by category."""
        self.evaluation.end(self, "val")
        if not self.trainer.sanity_checking:
            self.safe_point.validated = int(self.batches)
            if self.trainer.state.fn == "fit":
                self.steps.after_validation(self)

    def on_validation_end(self) -> None:
        """Keep the state again: it has this validation's figures now."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.safe_point.keep(self)

    def test_step(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """Sample with `val_sampling` and judge."""
        self.evaluation.step(self, self.policy, prompts, self.val_sampling, "test")

    def on_test_epoch_end(self) -> None:
        """Log mean@k and maj@k under `test/`."""
        self.evaluation.end(self, "test")

    def predict_step(self, prompts: Sequence[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Sample with `val_sampling` and judge; returns one record per rollout."""
        return self.evaluation.predict(self, self.policy, prompts, self.val_sampling)

    def teardown(self, stage: str) -> None:
        """Close the rollout's engine and the processes that judge."""
        self.collector.close()

    # --------------------------------------------------- records and checkpoints

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, and keep the name for the run's records."""
        super().log(name, value, *args, **kwargs)
        self.recorder.note(name)

    def described(self) -> dict[str, Any]:
        """Policy, sampling and success threshold, which are written beside each evaluation."""
        return {
            "policy": self.policy.name_or_path,
            "sampling": asdict(self.val_sampling),
            "success_threshold": self.success_threshold,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state that Lightning does not save; refuse to save a broken one.

        Raises:
            TrainingStopped: if weights are not finite, or a step was interrupted halfway.
        """
        fault = non_finite_anywhere(checkpoint["state_dict"])
        if fault or self.steps.under_way:
            raise TrainingStopped(
                f"{fault or 'an optimizer step was interrupted'}; no checkpoint is saved"
            )
        self.safe_point.into(checkpoint, self)
        if self.ahead.batches and self.trainer.state.fn == "fit":
            checkpoint["ahead"] = self.drawn_ahead.saved(
                self,
                self.trainer.global_step,
                under_way=under_way(self.trainer),
                alone=self.safe_point.alone,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the state that Lightning does not, and check that the checkpoint fits.

        Raises:
            ConfigurationError: if it is of another model, or of another method and the change was
                not confirmed.
        """
        self.configure_model()
        other = self.policy_only or any(change.of_memory for change in self.changed)
        fit_weights(checkpoint["state_dict"], self.state_dict(), policy_only=other)
        if self.policy_only:
            return
        self.safe_point.validated = checkpoint.get("validated", -1)
        if (
            "ahead" in checkpoint
        ):  # also where nothing is sampled ahead now: pooled tokens have ages
            self.drawn_ahead.load(checkpoint["ahead"])

        def renewed() -> tuple[torch.optim.Optimizer, Any]:
            optimizer = self.optimizer([nn.Parameter(torch.zeros(1))])
            return optimizer, self.lr_scheduler(optimizer)

        with blamed_on("the checkpoint"):
            take_back(self, checkpoint, self.changed, renewed)
