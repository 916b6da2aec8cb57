"""The LightningModule: prompts, rollouts, verdicts, teacher, advantage, weighting, one loss."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from scsdpo.advantage import Advantage
from scsdpo.distributed import all_sum, sum_gradients
from scsdpo.errors import ConfigurationError, TrainingStopped, blamed_on
from scsdpo.loss import Importance, NoImportance
from scsdpo.metrics import ByCategory, GapCheck, rollout_metrics, token_metrics
from scsdpo.policy import CausalLM
from scsdpo.reduction import Reduction, SequenceMean
from scsdpo.rollout import HFRollout, Rollout
from scsdpo.selection import Everything, Selection
from scsdpo.state import Stateful, memory
from scsdpo.teacher import NoTeacher, Teacher
from scsdpo.training.compatibility import check_axes
from scsdpo.training.update import Batch, Update
from scsdpo.types import Outcomes, Prompt, Rollouts, Sampling
from scsdpo.verifiers import Verification, VerifierPool, report_errors
from scsdpo.weighting import TokenWeighting, Uniform, UniformTokens, Weighting


class PolicyOptimizer(L.LightningModule):
    """Self-distillation policy optimization, composed of strategies.

    Each batch of questions is answered, judged, and learned from:

        rollouts = rollout.sample(policy, prompts, sampling)
        outcomes = judge(rollouts)
        contexts = teacher.contexts(...)
        weights  = weighting.weigh(outcomes)
        plan     = advantage.plan(outcomes, contexts.available)
        loss     = sum_t reduction * weight * token weight * importance * objective_t

    Args:
        policy: the language model that is trained.
        advantage: what credit each vocabulary entry gets at each position.
        teacher: what the model would have said had it known more.
        weighting: how much each question and rollout counts.
        rollout: which responses are learned from.
        selection: which groups of them, and when: `Everything()`, or `InformativePool` (DAPO).
        token_weighting: how much each token counts.
        reduction: how token losses add up.
        importance: correction for the sampler's distribution.
        reference: a second teacher, for anchors.
        gap: how far sampler and trainer may disagree.
        sampling: how training responses are drawn; `n` is the group size G.
        val_sampling: how validation responses are drawn; `n` is k of mean@k and maj@k.
        verification: how responses are judged: processes and deadlines.
        optimizer: made from the trainable parameters.
        lr_scheduler: stepped once per optimizer step taken.
        updates_per_rollout: optimizer steps on one batch of rollouts, split by question.
        max_grad_norm: clip on the gradient's norm. inf: none.
        max_tokens: budget of a micro-batch, in distinct tokens; `auto` takes it from free memory.
            It changes memory and speed, and no number.
        success_threshold: reward from which a rollout counts as a success.
        max_bad_steps: non-finite steps in a row after which the run stops.
        max_idle_batches: batches in a row without anything to learn from after which it stops:
            they take no step, so that `trainer.max_steps` alone would wait for ever.

    Raises:
        ConfigurationError: if the strategies do not fit together.
    """

    batches: Tensor
    skipped: Tensor

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
        lr_scheduler: LRSchedulerCallable = lambda o: torch.optim.lr_scheduler.ConstantLR(
            o, factor=1.0
        ),
        updates_per_rollout: int = 1,
        max_grad_norm: float = 1.0,
        max_tokens: PositiveInt | Literal["auto"] = "auto",
        success_threshold: float = 0.5,
        max_bad_steps: int = 5,
        max_idle_batches: int = 100,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not saved; `on_load_checkpoint` is strict
        self.policy, self.teacher, self.reference = policy, teacher, reference
        self.rollout, self.selection = rollout, selection
        self.advantage, self.weighting, self.gap = advantage, weighting, gap
        self.sampling, self.val_sampling = sampling, val_sampling
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.updates_per_rollout = updates_per_rollout
        self.max_grad_norm, self.max_tokens = max_grad_norm, max_tokens
        self.max_bad_steps, self.max_idle_batches = max_bad_steps, max_idle_batches
        self.success_threshold = success_threshold
        check_axes(self, token_weighting)
        # A bad setting of these fails here, and not after the weights were loaded.
        lr_scheduler(optimizer([nn.Parameter(torch.zeros(1))]))
        self.update = Update(
            teacher=teacher,
            reference=reference,
            token_weighting=token_weighting,
            reduction=reduction,
            importance=importance,
            needs=token_weighting.needs | advantage.needs | importance.needs,
        )
        self.verifiers = VerifierPool(verification)
        contexts = (teacher.context, reference.context)
        self.memory = memory(
            self, (advantage, weighting, token_weighting, teacher, reference, *contexts)
        )
        self.validation = ByCategory()
        # Counts batches, not steps: a batch that took no step must not be drawn again.
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.bad_steps = self.idle_batches = 0

    def setup(self, stage: str) -> None:
        """Start the processes that judge; they are ready before the weights are."""
        self.verifiers.start()

    def configure_model(self) -> None:
        """Load the weights, the teacher's after the policy's; a second call does nothing."""
        with blamed_on("model.policy"):
            self.policy.configure_model()
        self.weighting.configure(self.policy)
        self.teacher.configure(self.policy, "teacher")
        self.reference.configure(self.policy, "reference")

    def configure_optimizers(self) -> Any:
        """One optimizer over what is trained, in float32."""
        parameters = self.trained_parameters()
        wrong = {p.dtype for p in parameters} - {torch.float32, torch.float64}
        if wrong:
            raise ConfigurationError(
                f"trainable parameters must be float32, got {wrong.pop()}: a bf16 weight of 0.02 "
                "does not move at lr 1e-5; use `trainer.precision: bf16-mixed`, or model.policy "
                "with adapter Lora and dtype auto"
            )
        optimizer = self.optimizer(parameters)
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    # ------------------------------------------------------------------ training

    def training_step(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """One batch of questions: sample, judge, and `updates_per_rollout` optimizer steps."""
        if len(prompts) < self.updates_per_rollout:
            raise ConfigurationError(
                f"model.updates_per_rollout={self.updates_per_rollout} needs at least as many "
                f"questions per batch, got {len(prompts)}: raise data.questions_per_batch"
            )
        self.batches += 1
        rollouts = self.rollout.sample(self.policy, prompts, self.sampling.at(int(self.batches)))
        outcomes = self.judge(rollouts)
        chosen = [self.prepare(*judged) for judged in self.selection.select(rollouts, outcomes)]
        weights = torch.cat([outcomes.rewards[:0].double(), *(batch.weights for batch in chosen)])
        self._log("train", rollout_metrics(rollouts, outcomes, weights))
        for batch in chosen:
            self._learn(batch)

    def _learn(self, batch: Batch) -> None:
        parts = self._split(len(batch.rollouts.prompts))
        old = self._old_logprobs(batch, parts[1:])
        for i, part in enumerate(parts):
            self._optimize(batch if i == 0 else old, part)

    def judge(self, rollouts: Rollouts) -> Outcomes:
        """Verdicts of each prompt's verifier; those that failed are logged."""
        verdicts = self.verifiers.verify(rollouts.prompts, rollouts.texts)
        report_errors(verdicts)
        rewards = torch.tensor(
            [[verdict.reward for verdict in group] for group in verdicts],
            dtype=torch.float32,
            device=rollouts.ids.device,
        )
        return Outcomes(
            verdicts=verdicts,
            rewards=rewards,
            successes=rewards >= self.success_threshold,
            keys=tuple(prompt.key for prompt in rollouts.prompts),
        )

    def prepare(self, rollouts: Rollouts, outcomes: Outcomes) -> Batch:
        """Contexts, weights and plan: everything before the first forward."""
        contexts = self.teacher.contexts(self.policy.chat, rollouts, outcomes)
        references = self.reference.contexts(self.policy.chat, rollouts, outcomes)
        available = contexts.available.to(rollouts.ids.device).view_as(outcomes.successes)
        return Batch(
            rollouts=rollouts,
            plan=self.advantage.plan(outcomes, available),
            weights=self.weighting.weigh(outcomes),
            teacher=contexts,
            reference=references,
            old_logprobs=torch.full_like(
                rollouts.policy_logprobs, torch.nan, dtype=torch.float64
            ).flatten(0, 1),
        )

    def _split(self, questions: int) -> list[list[int]]:
        """Rows of each update: questions in order, in `updates_per_rollout` nearly equal parts."""
        group = self.sampling.n
        parts = torch.arange(questions * group).view(questions, group)
        return [p.flatten().tolist() for p in parts.tensor_split(self.updates_per_rollout)]

    def _old_logprobs(self, batch: Batch, later: list[list[int]]) -> Batch:
        """`batch` with the log-probs before the first update, for the rows of later updates."""
        rows = [row for part in later for row in part]
        if not rows:
            return batch
        old = self.update.measure(self.policy, batch, rows, self._token_budget())
        return replace(batch, old_logprobs=old)

    def _token_budget(self) -> int:
        return self.policy.token_budget() if self.max_tokens == "auto" else self.max_tokens

    def _optimize(self, batch: Batch, rows: list[int]) -> None:
        """One optimizer step on `rows`, unless nothing there can be learned from."""
        here = batch.active[rows]
        active, count = all_sum(torch.stack([here.sum(), batch.mask[rows][here].sum()])).tolist()
        if active == 0:
            self._idle()
            return
        self.idle_batches = 0
        loss, outputs = torch.zeros((), dtype=torch.float64, device=self.device), []
        with self._unsynchronized():
            budget = self._token_budget()
            for output, sampled in self.update.losses(self.policy, batch, rows, budget):
                self.manual_backward(output.loss)
                loss += output.loss.detach().double()
                outputs.append((output, sampled))
        parameters = self.trained_parameters()
        sum_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        metrics = {"loss": float(all_sum(loss)), "gradient_norm": float(norm)}
        # Later updates on a batch: the sampler's weights are those before the first of them.
        old = batch.old_logprobs[rows]
        sampled = batch.rollouts.policy_logprobs.flatten(0, 1)[rows]
        first = bool(old.isnan().all())
        gap = self.gap.measure([(o.logprob, s) for o, s in outputs] if first else [(old, sampled)])
        tokens = token_metrics([o for o, _ in outputs], self.advantage.objective_name)
        counts = {"trained_rollouts": active, "trained_tokens": count}
        self._log("train", metrics | tokens | gap | counts)
        self.gap.judge(gap)
        self._step(metrics, parameters, norm)

    def _idle(self) -> None:
        """Nothing to learn from: no step of optimizer, schedule or teacher; counted."""
        self.skipped += 1
        self.idle_batches += 1
        self._log("train", {"skipped": float(self.skipped)})
        if self.idle_batches >= self.max_idle_batches:
            rate = float(self.trainer.callback_metrics["train/pass_rate"])
            raise TrainingStopped(
                f"{self.idle_batches} batches in a row had nothing to learn from (pass rate "
                f"{rate:.2f}): the questions are all too hard or all mastered, or the verifier "
                "does not accept the policy's format; look at `scsdpo predict`"
            )

    def _step(
        self, metrics: dict[str, float], parameters: list[nn.Parameter], norm: Tensor
    ) -> None:
        """Clip and step; a non-finite loss or gradient is skipped, counted and reported."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if all(map(math.isfinite, metrics.values())):
            self.bad_steps = 0
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]
            self.teacher.after_step(self.policy)
            self.reference.after_step(self.policy)
            for part in self.modules():
                if isinstance(part, Stateful):
                    part.after_step()
        else:
            self.bad_steps += 1
            self.skipped += 1
            rank_zero_warn(f"step skipped, not finite: {metrics}")
            self._log("train", {"skipped": float(self.skipped)})
        optimizer.zero_grad()
        if self.bad_steps >= self.max_bad_steps:
            raise TrainingStopped(
                f"{self.bad_steps} steps in a row were not finite (last: {metrics}); the weights "
                "are those before the first of them. Lower the learning rate, or check the data"
            )

    def _unsynchronized(self) -> AbstractContextManager[None]:
        """Under DDP, backward without its own all-reduce: `sum_gradients` makes the only one, so
        that ranks may run different numbers of micro-batches.
        """
        strategy = self.trainer.strategy
        return (
            strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()
        )

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """Sample with `val_sampling` and judge."""
        rollouts = self.rollout.sample(self.policy, prompts, self.val_sampling)
        self.validation.update(rollouts, self.judge(rollouts))

    def on_validation_epoch_end(self) -> None:
        """Log mean@k and maj@k, overall and by category."""
        self._log("val", self.validation.compute(self.val_sampling.n, self.device))
        self.validation.reset()

    def test_step(self, prompts: Sequence[Prompt], batch_idx: int) -> None:
        """As validation."""
        self.validation_step(prompts, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As validation, under `test/`."""
        self._log("test", self.validation.compute(self.val_sampling.n, self.device))
        self.validation.reset()

    def predict_step(self, prompts: Sequence[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Responses and verdicts, one record per rollout."""
        rollouts = self.rollout.sample(self.policy, prompts, self.val_sampling)
        outcomes = self.judge(rollouts)
        return [
            {"key": prompt.key, "response": text, **asdict(verdict)}
            for prompt, texts, verdicts in zip(
                prompts, rollouts.texts, outcomes.verdicts, strict=True
            )
            for text, verdict in zip(texts, verdicts, strict=True)
        ]

    def _log(self, prefix: str, metrics: dict[str, float]) -> None:
        shown = {"pass_rate", f"mean@{self.val_sampling.n}"}
        for name, value in metrics.items():
            self.log(
                f"{prefix}/{name}",
                value,
                prog_bar=name in shown,
                batch_size=1,
                sync_dist=prefix == "train",
            )

    def teardown(self, stage: str) -> None:
        """Let the rollout's engine go, and the processes that judge."""
        self.rollout.close()
        self.verifiers.close()

    # --------------------------------------------------------------- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model: every saved key must be there, and no other."""
        self.configure_model()
        saved, own = set(checkpoint["state_dict"]), set(self.state_dict())
        if saved != own:
            odd = sorted(saved ^ own)
            raise ConfigurationError(
                f"the checkpoint does not fit this configuration: {len(saved - own)} of its "
                f"tensors have no place here and {len(own - saved)} are missing from it, "
                f"e.g. {odd[0]!r}; use the run's own config.yaml"
            )
