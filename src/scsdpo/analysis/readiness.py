"""What a configuration would learn from at first, and whether its teacher knows more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import lightning as L
import torch
from torch import Tensor

from scsdpo.analysis.directions import Directions, directions
from scsdpo.analysis.looking import Looking
from scsdpo.analysis.teacher_distance import distances
from scsdpo.analysis.telling import tellings
from scsdpo.analysis.told import told
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
    """Share of responses that are right, or in which the verifier found an answer; nan if it finds
    none in right ones, so that it does not say."""
    truncated: float
    """Share of responses that reach the cap on their length."""
    length: float
    """Mean, in tokens."""
    pass_rate: Estimate
    """Over questions."""
    mastered: float
    """Share of questions all of whose responses are right."""
    hopeless: float
    """Share of questions none of whose responses is right."""


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """All that was measured before training; nan and None: there was nothing to measure."""

    answers: Answers
    taught: float = float("nan")
    """Share of rollouts that have a teacher; nan: nobody is one."""
    taught_truncated: float = float("nan")
    """Of the tokens that are taught, those in responses that were cut off."""
    preference: float = float("nan")
    """Probability that the teacher's mean log T(y) / S(y) is larger on a right response than on a
    wrong one (the area under the ROC curve; 1/2: it does not tell them apart)."""
    told: dict[str, TeacherGain] = field(default_factory=dict)
    """`configured`: what the configured context tells; `another`: another question's
    demonstration in its place, which no teacher should gain from (OP2SD, arXiv:2608.09228), where
    it shows one; `gold`: the data's answer, where there is one; `feedback`: the verifier's on a
    failure, where it gives any."""
    directions: Directions | None = None


def measure(
    trainer: L.Trainer,
    model: PolicyOptimizer,
    data: TaskDataModule,
    questions: int,
    *,
    with_directions: bool = True,
) -> Readiness:
    """Ask training questions, let the teacher answer them, and look where the first step points.

    Args:
        trainer: of one device.
        model: not yet configured.
        data: its first training questions in a fixed random order are asked.
        questions: at most so many; at least two.
        with_directions: also take the six backward passes of `Directions`.

    Raises:
        ConfigurationError: if there are fewer than two questions.
    """
    chosen = data.some(questions, "scsdpo.check")
    data.val_sources = [told(chosen)]
    data.val_questions_per_batch = len(chosen)
    check = _Check(model, with_directions)
    trainer.predict(check, data, return_predictions=False)
    if check.found is None:
        raise ConfigurationError(
            f"data.train: `scsdpo check` needs two questions at least, and it gives {len(chosen)}, "
            "less those longer than data.max_prompt_tokens"
        )
    return check.found


class _Check(Looking):
    """Runs a `PolicyOptimizer`'s parts over one batch of questions."""

    def __init__(self, model: PolicyOptimizer, with_directions: bool) -> None:
        super().__init__(model)
        self.with_directions = with_directions
        self.found: Readiness | None = None

    def predict_step(self, prompts: Sequence[Prompt], batch_idx: int) -> list[Readiness]:
        """Measure everything; nothing to be collected."""
        if len(prompts) > 1:
            self._measure(prompts)
        return []

    def _measure(self, prompts: Sequence[Prompt]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.found = _readiness(self.model, prompts, self.with_directions)


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
    rows = [row for half in halves for row in distances(model, half)]
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
        "told": tellings(model, halves, contexts),
    }


def area(right: Sequence[float], wrong: Sequence[float]) -> float:
    """P(a right one's value > a wrong one's), ties count half; nan if there are none."""
    if not right or not wrong:
        return float("nan")
    a, b = torch.tensor(right).double()[:, None], torch.tensor(wrong).double()
    return float(((a > b).double() + (a == b).double() / 2).mean())
