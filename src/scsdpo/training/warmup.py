"""A first stage of `fit`, in which the policy learns to use its teacher's prompt.

Self-distillation gains nothing if the policy does not answer better after its teacher's prompt
(docs/will-it-work.md). So in this stage the policy learns right responses, each after the teacher's
prompt with a demonstration in it. It is supervised, and uses the same update as all other training.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from scsdpo import interrupt
from scsdpo.advantage import Advantage, Batch, Plan
from scsdpo.distributed import all_sum
from scsdpo.errors import ConfigurationError
from scsdpo.loss import Chunk, Credit, NoImportance, SparseCredit
from scsdpo.metrics import GapCheck, PhaseTimer, log_figures
from scsdpo.policy.chat import Chat
from scsdpo.reduction import SequenceMean
from scsdpo.teacher import GoldSolution, NoTeacher, Teacher
from scsdpo.training.step import Limits, OptimizerSteps, Update
from scsdpo.training.teacher_gain import (
    DemonstratingContext,
    SamplerAndJudge,
    TeacherCheck,
    TeacherGain,
    demonstrating_context,
)
from scsdpo.types import Judged, Prompt, Responses, TeacherContexts, Verdict
from scsdpo.weighting import UniformTokens

NAME = "warmup"
"""Prefix of its figures in the log."""


class Examples(ABC):
    """The right responses that a warm-up teaches."""

    @abstractmethod
    def responses(self, model: SamplerAndJudge, prompts: Sequence[Prompt]) -> Judged:
        """Responses to a batch's questions; the right ones are learned.

        Args:
            model: samples and judges, if the examples are its own.
            prompts: the questions, with their ids.
        """


@dataclass(frozen=True)
class Successes(Examples):
    """The policy's own right responses; each is learned after another one to the same question.

    The only success of a group is learned after itself. Each step samples a batch of responses, as
    training does, and needs nothing but the verifier.
    """

    def responses(self, model: SamplerAndJudge, prompts: Sequence[Prompt]) -> Judged:
        return model.judge(model.sample(prompts, model.sampling.at(int(model.batches))))


@dataclass(frozen=True, kw_only=True)
class GoldAnswers(Examples):
    """The data's own answers, in the form that the verifier reads; nothing is sampled.

    A question without an answer gives no example. A response ends with the first stop string of its
    sampling, or else with an end-of-sequence token.

    Args:
        response: the text that is learned and shown as the demonstration, with {answer} in it, such
            as `The answer is {answer}.`

    Raises:
        ValueError: if {answer} is missing.
    """

    response: str = "{answer}"

    def __post_init__(self) -> None:
        if "{answer}" not in self.response:
            raise ValueError(
                f"`GoldAnswers(response=...)` must contain {{answer}}, got {self.response!r}"
            )

    def responses(self, model: SamplerAndJudge, prompts: Sequence[Prompt]) -> Judged:
        chat, device = model.policy.chat, model.device
        texts = [self.response.replace("{answer}", p.answer) for p in prompts]
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            stops = model.sampling.stops(prompt)
            said = chat.encode(text + (stops[0] if stops else ""))
            end = () if stops else chat.eos_ids[:1]
            rows.append((*said, *end) if prompt.answer.strip() else ())
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None, None]
        there = torch.arange(max(map(len, rows), default=0)) < lengths  # [Q, 1, L]
        ids = torch.full(there.shape, chat.pad_id)
        ids[there] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
        unknown = torch.full(there.shape, torch.nan)
        right = lengths[:, :, 0] > 0
        made = Responses.of_one_turn(
            prompts=tuple(prompts),
            ids=ids,
            sampled=there,
            sampling_logprobs=unknown,
            policy_logprobs=unknown,
            ended=torch.ones_like(right),
            texts=tuple((text,) for text in texts),
            temperature=1.0,
        )
        return Judged(
            responses=made,
            verdicts=tuple((Verdict(reward=float(each)),) for each in right),
            rewards=right.float(),
            successes=right,
        ).to(device)


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Supervised steps before the first self-distilled one.

        loss = - mean over responses of mean_t log S(y_t | teacher's prompt, y_<t)

    Each response stands after exactly the prompt that its teacher would read, which is
    `model.teacher.context` with a demonstration in it. Before the first step, every `measure_every`
    steps and after the last one the policy answers some training questions, alone and after the
    teacher's prompt (`TeacherGain`); validation questions are never used. At the end of the stage
    the teacher becomes a copy of the policy, the optimizer's state is cleared, and training goes
    on. Steps of this stage count as steps of the run.

    Args:
        steps: optimizer steps of this stage; 0: there is none.
        examples: `Successes()`, the policy's own responses, or `GoldAnswers`, the data's.
        enough: the stage ends early when the whole 95 % interval of the gain, a difference of
            pass rates, is above this; 1: never.
        measure_every: steps from one measurement to the next.
        questions: training questions that are measured, over all ranks.
        check: the check, before the first step behind this stage, that the policy can use its
            teacher's prompt.

    Raises:
        ValueError: if `enough` is not above -1.

    Source:
        docs/will-it-work.md; ours.
    """

    steps: NonNegativeInt = 0
    examples: Examples = Successes()
    enough: float = 1.0
    measure_every: PositiveInt = 15
    questions: PositiveInt = 16
    check: TeacherCheck = TeacherCheck()

    def __post_init__(self) -> None:
        if not self.enough > -1:
            raise ValueError(f"`Warmup(enough=...)` must be > -1, got {self.enough}")

    def check_teachers(self, teacher: Teacher, reference: Teacher) -> None:
        """Refuse teachers that cannot be warmed up, before any weight is loaded.

        Raises:
            ConfigurationError: naming the key and the remedy.
        """
        for slot, each in (("teacher", teacher), ("reference", reference)):
            if each.exists and not each.can_begin_anew:
                raise ConfigurationError(
                    f"model.warmup: after the warm-up the weights of model.{slot} are set to the "
                    f"policy's, which {type(each).__name__} does not support: set model.{slot} to "
                    "EMA (rate 0 keeps these weights), Restart or Live, or model.warmup.steps to 0"
                )
        if not teacher.exists or demonstrating_context(teacher.context) is None:
            raise ConfigurationError(
                "model.warmup: the warm-up trains on the teacher's prompt with a demonstration in "
                f"it, and model.teacher ({type(teacher).__name__}, "
                f"{type(teacher.context).__name__}) shows none: set model.teacher.context to "
                "SiblingDemonstration or GoldSolution, or model.warmup.steps to 0"
            )


class _Likelihood(Advantage):
    """Credit 1 for every sampled token, which gives the gradient of the cross entropy."""

    @property
    def objective_name(self) -> str:
        return "cross_entropy"

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        def credit(chunk: Chunk) -> Credit:
            return SparseCredit.at_sampled(chunk, torch.ones_like(chunk.logprob), -chunk.logprob)

        return Plan(active=torch.ones_like(judged.successes), credit=credit)


class WarmupStage(nn.Module):
    """The state of a warm-up, and its steps.

    Args:
        settings: settings of the stage.
        teacher: its context makes the prompts. It becomes a copy of the policy at the end.
        reference: it becomes a copy of the policy at the end, too.
        limits: as in training.
        timer: as in training.
    """

    taken: Tensor
    """Optimizer steps of the stage so far."""
    over: Tensor
    """[] bool: the stage has ended."""

    def __init__(
        self,
        settings: Warmup,
        *,
        teacher: Teacher,
        reference: Teacher,
        limits: Limits,
        timer: PhaseTimer,
    ) -> None:
        super().__init__()
        self.settings = settings
        # In a tuple nn.Module does not register them: they are parts of the PolicyOptimizer.
        self._teachers = (teacher, reference)
        context = demonstrating_context(teacher.context)
        assert context is not None
        self.context: DemonstratingContext = context
        self.advantage = _Likelihood()
        nobody = NoTeacher()
        update = Update(
            teacher=nobody,
            reference=nobody,
            token_weighting=UniformTokens(),
            reduction=SequenceMean(),
            importance=NoImportance(),
            needs=frozenset(),
            timer=timer,
        )
        self.steps = OptimizerSteps(
            update,
            limits=limits,
            gap=GapCheck(),
            objective_name=self.advantage.objective_name,
            prefix=NAME,
            counts=False,
        )
        self.last: TeacherGain | None = None
        """The last measurement."""
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("over", torch.zeros((), dtype=torch.bool))

    def goes_on(self, host: Any, measure: Callable[[str, str], TeacherGain]) -> bool:
        """Decide whether the next batch belongs to the warm-up; measure where that is due.

        Args:
            host: the `PolicyOptimizer`, of a Trainer that fits.
            measure: (name of the measurement, when it is made, in words) -> the teacher's gain.
        """
        taken, settings = int(self.taken), self.settings
        last = taken >= settings.steps
        if last or taken % settings.measure_every == 0:
            when = f"warm-up, after {taken} of {settings.steps} steps"
            self.last = measure(f"{NAME}/{taken}", when)
            last = last or self.last.gain.low > settings.enough
        if last:
            for teacher in self._teachers:
                teacher.begin_anew(host.policy)
            host.optimizers().state.clear()  # its moments are of another loss's gradients
            self.over.fill_(True)
        return not last

    def step(self, host: Any, prompts: Sequence[Prompt]) -> None:
        """Learn from examples of a batch's questions; a batch without any takes no step.

        Args:
            host: the `PolicyOptimizer`, of a Trainer that fits.
            prompts: this rank's questions, with their ids.
        """
        judged = self.settings.examples.responses(host, prompts)
        interrupt.meet()
        batch = self.batch(host.policy.chat, judged)
        rates = judged.pass_rates
        known = [
            rates.sum(),
            rates.new_tensor(len(rates)),
            batch.weights.new_tensor(len(batch.weights)),
        ]
        right, questions, examples = all_sum(torch.stack(known)).tolist()
        figures = {"examples": examples, "pass_rate": right / max(questions, 1)}
        log_figures(host, NAME, figures)
        skipped = int(self.steps.skipped)
        self.steps.learn(host, host.policy, batch)
        self.taken += int(self.steps.skipped) == skipped

    def batch(self, chat: Chat, judged: Judged) -> Batch:
        """A batch of right responses after their teacher's prompts, N questions of one response.

        The loss is the mean over questions of the mean over each question's responses.
        """
        group = judged.rewards.shape[1]
        rows, prompts, counts = list[int](), list[Prompt](), list[int]()
        for q, prompt in enumerate(judged.prompts):
            ids = {g: self._shown(chat, q, g, judged) for g in judged.best_first(q)}
            found = [g for g, each in ids.items() if each]
            rows += [q * group + g for g in found]
            prompts += [replace(prompt, ids=ids[g]) for g in found]
            counts += [len(found)] * len(found)
        each = torch.tensor(counts, dtype=torch.float64).reciprocal()
        examples, questions = all_sum(torch.tensor([len(rows), float(each.sum())])).tolist()
        weights = each * (examples / max(questions, 1))  # the reduction divides by `examples`
        alone = judged.alone(rows, prompts)
        unknown = torch.full_like(alone.responses.policy_logprobs, torch.nan)
        learned = replace(alone.responses, policy_logprobs=unknown, temperature=1.0)
        alone = replace(alone, responses=learned)
        nothing = TeacherContexts(ids=tuple(((),) for _ in rows))
        return Batch.of(
            alone,
            self.advantage.planned(alone, torch.zeros_like(alone.successes)),
            weights.to(judged.rewards.device)[:, None],
            {"teacher": nothing, "reference": nothing},
            (len(rows),),
            self.advantage.objective_name,
        )

    def _shown(self, chat: Chat, question: int, rollout: int, judged: Judged) -> tuple[int, ...]:
        """The teacher's prompt before a success. It shows another success, or else this one."""
        prompt = judged.prompts[question]
        if isinstance(self.context, GoldSolution):
            return self.context.show(chat, prompt, prompt.answer)
        text = self.context.demonstration(question, rollout, judged)
        if not text:
            shown = self.context.demonstrations(question, judged)
            text = next((text for _, text in shown), "")
        return self.context.show(chat, prompt, text)
