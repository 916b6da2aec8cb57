"""A first stage of `fit`: the policy learns to use what its teacher is told.

Self-distillation gains nothing where a policy does not answer better for what it is told
(docs/will-it-work.md). So before it, for some steps, the policy learns right responses, each after
the teacher's prompt with a demonstration in it: supervised, by the same update as all else.
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
    Answering,
    Shown,
    TeacherCheck,
    Telling,
    shown_by,
)
from scsdpo.types import Judged, Prompt, Responses, TeacherContexts, Verdict
from scsdpo.weighting import UniformTokens

NAME = "warmup"
"""Prefix of its figures."""


class Examples(ABC):
    """Which right responses a warm-up teaches."""

    @abstractmethod
    def responses(self, model: Answering, prompts: Sequence[Prompt]) -> Judged:
        """Responses to a batch's questions; the right ones are learned.

        Args:
            model: answers and judges, where they are its own.
            prompts: with their ids.
        """


@dataclass(frozen=True)
class Successes(Examples):
    """The policy's own right responses, each learned after another right one to its question.

    The only success of a group is read before itself. They take a batch of responses a step, as
    training does, and nothing but the verifier.
    """

    def responses(self, model: Answering, prompts: Sequence[Prompt]) -> Judged:
        return model.judge(model.sample(prompts, model.sampling.at(int(model.batches))))


@dataclass(frozen=True, kw_only=True)
class GoldAnswers(Examples):
    """The data's own answers, in the form that the verifier reads; nothing is sampled.

    A question without an answer has none. A response ends with the first stop string of its
    sampling, or else with the end of a sequence.

    Args:
        response: what is learned, and shown as the demonstration, with {answer} in it, such as
            `The answer is {answer}.`

    Raises:
        ValueError: if {answer} is missing.
    """

    response: str = "{answer}"

    def __post_init__(self) -> None:
        if "{answer}" not in self.response:
            raise ValueError(
                f"`GoldAnswers(response=...)` must contain {{answer}}, got {self.response!r}"
            )

    def responses(self, model: Answering, prompts: Sequence[Prompt]) -> Judged:
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

    A response is read after exactly what its teacher would read, `model.teacher.context` with a
    demonstration in it. Before the first step, each `measure_every` steps and after the last one
    the policy answers some training questions alone and told (`Telling`); validation questions are
    never used. Then the teacher begins anew as a copy of the policy, the optimizer's state is
    cleared, and training goes on. Steps of this stage count as steps of the run.

    Args:
        steps: optimizer steps of it; 0: there is no such stage.
        examples: `Successes()`, the policy's own, or `GoldAnswers`, the data's.
        enough: the stage ends early when the whole 95 % interval of the gain, a difference of
            pass rates, is above this; 1: never.
        measure_every: steps from one measurement to the next.
        questions: training questions that are measured, over all ranks.
        check: before the first step that is not one of these, whether the policy can use it.

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
                    f"model.warmup: model.{slot} must be reset to the policy after the warm-up, "
                    f"and {type(each).__name__} keeps its own weights: choose EMA (with rate 0 it "
                    "stays as the policy was then), Restart or Live"
                )
        if not teacher.exists or shown_by(teacher.context) is None:
            raise ConfigurationError(
                "model.warmup: the policy learns to use a demonstration in its teacher's prompt, "
                f"and model.teacher ({type(teacher).__name__}, "
                f"{type(teacher.context).__name__}) shows none: set model.warmup.steps to 0, or "
                "the teacher's context to SiblingDemonstration or GoldSolution"
            )


class _Likelihood(Advantage):
    """Credit 1 for every token: minus its gradient is that of the cross entropy."""

    @property
    def objective_name(self) -> str:
        return "cross_entropy"

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(active=torch.ones_like(judged.successes), credit=_likelihood)


def _likelihood(chunk: Chunk) -> Credit:
    return SparseCredit.at_sampled(chunk, torch.ones_like(chunk.logprob), -chunk.logprob)


class WarmupStage(nn.Module):
    """Where a warm-up is, and its steps.

    Args:
        settings: of the stage.
        teacher: whose prompts are read, and which begins anew at the end.
        reference: begins anew, too.
        limits: as in training.
        timer: as in training.
    """

    taken: Tensor
    """Optimizer steps of the stage so far."""
    over: Tensor
    """Whether it has ended."""

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
        self._teachers = (teacher, reference)  # a tuple: they are the module's own parts
        context = shown_by(teacher.context)
        assert context is not None
        self.context: Shown = context
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
        self.last: Telling | None = None
        """What was measured last."""
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("over", torch.zeros((), dtype=torch.bool))

    def goes_on(self, host: Any, measure: Callable[[str, str], Telling]) -> bool:
        """Whether the next batch is one of the warm-up; measures where that is due.

        Args:
            host: the `PolicyOptimizer`, of a Trainer that fits.
            measure: told against alone, by the name of the asking and what is said of it.
        """
        taken, settings = int(self.taken), self.settings
        last = taken >= settings.steps
        if last or taken % settings.measure_every == 0:
            said = f"warm-up, after {taken} of {settings.steps} steps"
            self.last = measure(f"{NAME}/{taken}", said)
            last = last or self.last.gain.low > settings.enough
        if last:
            self._end(host)
        return not last

    def _end(self, host: Any) -> None:
        for teacher in self._teachers:
            teacher.begin_anew(host.policy)
        host.optimizers().state.clear()  # moments of gradients of another loss
        self.over.fill_(True)

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
        """Right responses after their teacher's prompts, each as a question of its own [N, 1, L].

        The loss is a mean over questions, of a question the mean over its responses.
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
        weights = each * (examples / max(questions, 1))  # the reduction divides by all examples
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
        """The teacher's prompt before a success: it shows another, or if there is none this one."""
        prompt = judged.prompts[question]
        if isinstance(self.context, GoldSolution):
            return self.context.show(chat, prompt, prompt.answer)
        text = self.context.demonstration(question, rollout, judged)
        if not text:
            shown = self.context.demonstrations(question, judged)
            text = next((text for _, text in shown), "")
        return self.context.show(chat, prompt, text)
