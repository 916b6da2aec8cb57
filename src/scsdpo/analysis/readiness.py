"""Measures, before training, what a configuration would learn from and how good its teacher is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import lightning as L
import torch
from torch import Tensor

from scsdpo.analysis.directions import Directions, directions
from scsdpo.analysis.module import AnalysisModule, given_prompts
from scsdpo.analysis.teacher_distance import teacher_distances
from scsdpo.analysis.teacher_gains import teacher_gains
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.statistics import Estimate, score_interval
from scsdpo.training import PolicyOptimizer
from scsdpo.training.teacher_gain import TeacherGain
from scsdpo.types import Judged, Prompt, Verdict


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The policy's own responses to training questions, drawn as in training."""

    questions: int
    group: int
    formed: float
    """Share of responses that are right, or in which the verifier found an answer; nan if it
    reports no answer even for right responses."""
    truncated: float
    """Share of responses that reach the cap on their length."""
    length: float
    """Mean length, in tokens."""
    pass_rate: Estimate
    """Mean over questions."""
    mastered: float
    """Share of questions all of whose responses are right."""
    hopeless: float
    """Share of questions none of whose responses is right."""


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """All measurements before training; nan and None: there was nothing to measure."""

    answers: Answers
    taught: float = float("nan")
    """Share of rollouts that have a teacher prompt; nan: the configuration has no teacher."""
    taught_truncated: float = float("nan")
    """Share of the tokens with a teacher that are in responses which were cut off."""
    preference: float = float("nan")
    """Probability that the teacher's mean log T(y) / S(y) is larger on a right response than on a
    wrong one (area under the ROC curve; 1/2: it does not distinguish them)."""
    told: dict[str, TeacherGain] = field(default_factory=dict)
    """Gain by the prompt that the policy reads. `configured`: that of the configured context;
    `another`: with another question's demonstration in it, from which no teacher should gain
    (OP2SD, arXiv:2608.09228), if the context shows one; `gold`: the data's answer, if there is
    one; `feedback`: the verifier's feedback on a failure, if it gives any."""
    directions: Directions | None = None


def measure_readiness(
    trainer: L.Trainer,
    model: PolicyOptimizer,
    data: TaskDataModule,
    questions: int,
    *,
    with_directions: bool = True,
) -> Readiness:
    """Measure the policy on training questions, its teacher's gain, and its first step.

    Args:
        trainer: a Trainer of one device.
        model: without its weights yet.
        data: its first training questions, in a fixed random order, are asked.
        questions: number of questions, at most; at least two.
        with_directions: also run the six backward passes of `Directions`.

    Raises:
        ConfigurationError: if there are fewer than two questions.
    """
    chosen = data.some(questions, "scsdpo.check")
    data.val_sources = [given_prompts(chosen)]
    data.val_questions_per_batch = len(chosen)
    check = _Check(model, with_directions)
    trainer.predict(check, data, return_predictions=False)
    if check.found is None:
        raise ConfigurationError(
            f"data.train: `scsdpo check` needs at least two questions that are not longer than "
            f"data.max_prompt_tokens, got {len(chosen)} questions in all; raise --questions, or "
            "data.max_prompt_tokens"
        )
    return check.found


class _Check(AnalysisModule):
    """Runs the measurements on one batch of questions."""

    def __init__(self, model: PolicyOptimizer, with_directions: bool) -> None:
        super().__init__(model)
        self.with_directions = with_directions
        self.found: Readiness | None = None

    def predict_step(self, prompts: Sequence[Prompt], batch_idx: int) -> list[Readiness]:
        """Run all measurements; the result is in `found`."""
        if len(prompts) > 1:
            with torch.inference_mode(False), torch.enable_grad():
                self.found = _readiness(self.model, prompts, self.with_directions)
        return []


def _readiness(
    model: PolicyOptimizer, prompts: Sequence[Prompt], with_directions: bool
) -> Readiness:
    sampling = model.sampling.at(0)
    halves = [model.judge(model.sample(p, sampling)) for p in (prompts[0::2], prompts[1::2])]
    found: dict[str, Any] = {}
    if model.teacher.exists:
        found = _taught(model, halves)
    if with_directions:
        found["directions"] = directions(model, halves)
    return Readiness(answers=_answers(halves), **found)


def _answers(halves: Sequence[Judged]) -> Answers:
    verdicts = [v for half in halves for group in half.verdicts for v in group]
    right = torch.cat([half.successes.flatten() for half in halves]).tolist()
    rates = torch.cat([half.pass_rates for half in halves]).tolist()

    def mean(of: Sequence[Tensor]) -> float:
        return float(torch.cat([table.double().flatten() for table in of]).mean())

    return Answers(
        questions=len(rates),
        group=halves[0].rewards.shape[1],
        formed=_formed(verdicts, right),
        truncated=1 - mean([half.ended for half in halves]),
        length=mean([half.lengths for half in halves]),
        pass_rate=score_interval(rates),
        mastered=fmean(rate == 1 for rate in rates),
        hopeless=fmean(rate == 0 for rate in rates),
    )


def _formed(verdicts: Sequence[Verdict], right: Sequence[bool]) -> float:
    found = [verdict.answer is not None for verdict in verdicts]
    if any(right) and not any(found):
        return float("nan")
    return fmean(a or b for a, b in zip(found, right, strict=True))


def _taught(model: PolicyOptimizer, halves: Sequence[Judged]) -> dict[str, Any]:
    contexts = [model.teacher.context.render(model.policy.chat, half) for half in halves]
    rows = [row for half in halves for row in teacher_distances(model, half)]
    available = [
        context.available.to(half.rewards.device)
        for context, half in zip(contexts, halves, strict=True)
    ]
    tokens = [half.lengths * a for half, a in zip(halves, available, strict=True)]
    total = sum(float(t.sum()) for t in tokens)
    cut = sum(float((t * ~half.ended).sum()) for t, half in zip(tokens, halves, strict=True))
    values = [(row.values["log_teacher_over_student"], row.correct) for row in rows]
    return {
        "taught": float(torch.cat(available).double().mean()),
        "taught_truncated": cut / total if total else float("nan"),
        "preference": area([v for v, c in values if c], [v for v, c in values if not c]),
        "told": teacher_gains(model, halves, contexts),
    }


def area(right: Sequence[float], wrong: Sequence[float]) -> float:
    """P(value of a right response > value of a wrong one), ties count half; nan without both."""
    if not right or not wrong:
        return float("nan")
    a, b = torch.tensor(right).double()[:, None], torch.tensor(wrong).double()
    return float(((a > b).double() + (a == b).double() / 2).mean())
