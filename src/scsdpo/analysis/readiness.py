"""What a configuration would learn from at first, and whether its teacher knows more."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from scsdpo.analysis.directions import Answered, Directions, directions
from scsdpo.analysis.looking import Looking
from scsdpo.analysis.teacher_distance import distances
from scsdpo.analysis.told import told
from scsdpo.data import TaskDataModule
from scsdpo.statistics import Estimate, mean_interval, score_interval
from scsdpo.teacher import Feedback, GoldSolution, SiblingDemonstration
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Outcomes, Prompt, Rollouts, TeacherContexts, stable_hash


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The policy's own responses to training questions, drawn as in training."""

    questions: int
    group: int
    formed: float
    """Share of responses in which the verifier found an answer."""
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
class Telling:
    """One way of telling the teacher something: accuracy of responses drawn after its prompt."""

    without: Estimate
    """The policy's own accuracy on the same questions, from the responses that are shown."""
    told: Estimate
    gain: Estimate
    """Paired by question."""


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """All that was measured before training; nan and None: there was nothing to measure."""

    answers: Answers
    taught: float = 0.0
    """Share of rollouts that have a teacher."""
    taught_truncated: float = float("nan")
    """Of the tokens that are taught, those in responses that were cut off."""
    preference: float = float("nan")
    """Probability that the teacher's mean log T(y) / S(y) is larger on a right response than on a
    wrong one (the area under the ROC curve; 1/2: it does not tell them apart)."""
    told: dict[str, Telling] = field(default_factory=dict)
    """`configured`: what the configured context tells; `another`: another question's
    demonstration, which no teacher should gain from (OP2SD, arXiv:2608.09228); `gold`: the data's
    answer, where there is one; `feedback`: the verifier's on a failure, where it gives any."""
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
    """
    share = -(-questions // len(data.train_sources))
    chosen: list[Prompt] = []
    for number, source in enumerate(data.train_sources):
        order = source.shuffled(stable_hash("scsdpo.check", number))
        chosen += [prompt for prompt, _ in zip(order, range(share), strict=False)]
    chosen = chosen[:questions]
    data.val_sources = [told(chosen)]
    data.val_questions_per_batch = len(chosen)
    check = _Check(model, with_directions)
    trainer.predict(check, data, return_predictions=False)
    assert check.found is not None
    return check.found


class Asked(NamedTuple):
    """A question, the policy's own pass rate on it, and what is read instead; empty: nothing."""

    prompt: Prompt
    rate: float
    ids: tuple[int, ...]


class _Check(Looking):
    """Runs a `PolicyOptimizer`'s parts over one batch of questions."""

    def __init__(self, model: PolicyOptimizer, with_directions: bool) -> None:
        super().__init__(model)
        self.with_directions = with_directions
        self.found: Readiness | None = None

    def predict_step(self, prompts: Sequence[Prompt], batch_idx: int) -> list[Readiness]:
        """Measure everything; nothing to be collected."""
        with torch.inference_mode(False), torch.enable_grad():
            self.found = _readiness(self.model, prompts, self.with_directions)
        return []


def _readiness(
    model: PolicyOptimizer, prompts: Sequence[Prompt], with_directions: bool
) -> Readiness:
    halves: list[Answered] = []
    for half in (prompts[0::2], prompts[1::2]):
        rollouts = model.rollout.sample(model.policy, half, model.sampling.at(0))
        halves.append((rollouts, model.judge(rollouts)))
    found: dict[str, Any] = {}
    if model.teacher.exists:
        found = _taught(model, halves)
    if with_directions:
        found["directions"] = directions(model, halves)
    return Readiness(answers=_answers(halves), **found)


def _answers(halves: Sequence[Answered]) -> Answers:
    verdicts = [v for _, o in halves for group in o.verdicts for v in group]
    rates = torch.cat([outcomes.pass_rates for _, outcomes in halves]).tolist()

    def mean(of: Sequence[Tensor]) -> float:
        return float(torch.cat([table.double().flatten() for table in of]).mean())

    return Answers(
        questions=len(rates),
        group=halves[0][0].ids.shape[1],
        formed=fmean(v.answer is not None for v in verdicts),
        truncated=1 - mean([rollouts.finished for rollouts, _ in halves]),
        length=mean([rollouts.lengths for rollouts, _ in halves]),
        pass_rate=score_interval(rates),
        mastered=fmean(rate == 1 for rate in rates),
        hopeless=fmean(rate == 0 for rate in rates),
    )


def _taught(model: PolicyOptimizer, halves: Sequence[Answered]) -> dict[str, Any]:
    contexts = [model.teacher.contexts(model.policy.chat, *half) for half in halves]
    rows = [row for half in halves for row in distances(model, *half)]
    available = [
        told.available.to(rollouts.ids.device)
        for told, (rollouts, _) in zip(contexts, halves, strict=True)
    ]
    tokens = [r.lengths * a for (r, _), a in zip(halves, available, strict=True)]
    total = sum(float(t.sum()) for t in tokens)
    cut = sum(float((t * ~r.finished).sum()) for t, (r, _) in zip(tokens, halves, strict=True))
    values = [(row.values["log_teacher_over_student"], row.correct) for row in rows]
    return {
        "taught": float(torch.cat(available).double().mean()),
        "taught_truncated": cut / total if total else float("nan"),
        "preference": area([v for v, c in values if c], [v for v, c in values if not c]),
        "told": _told(model, halves, contexts),
    }


def area(right: Sequence[float], wrong: Sequence[float]) -> float:
    """P(a right one's value > a wrong one's), ties count half; nan if there are none."""
    if not right or not wrong:
        return float("nan")
    a, b = torch.tensor(right).double()[:, None], torch.tensor(wrong).double()
    return float(((a > b).double() + (a == b).double() / 2).mean())


def _demonstration(
    model: PolicyOptimizer, rollouts: Rollouts, outcomes: Outcomes, question: int
) -> str:
    """What shows a right response to the question: the data's, or the first of the policy's."""
    if isinstance(model.teacher.context, GoldSolution):
        return rollouts.prompts[question].answer
    good = outcomes.successes[question].nonzero()[:, 0].tolist()
    return rollouts.texts[question][good[0]] if good else ""


def _told(
    model: PolicyOptimizer, halves: Sequence[Answered], contexts: Sequence[TeacherContexts]
) -> dict[str, Telling]:
    """Responses drawn after prompts that tell this or that; `contexts` is the configured one's."""
    context, chat = model.teacher.context, model.policy.chat
    own: SiblingDemonstration | Feedback | GoldSolution = SiblingDemonstration()
    if isinstance(context, SiblingDemonstration | Feedback | GoldSolution):
        own = context
    asked: dict[str, list[Asked]] = {"configured": [], "another": [], "gold": [], "feedback": []}
    ways = {}
    for name, kind in (("gold", GoldSolution), ("feedback", Feedback)):
        if not isinstance(context, kind):
            ways[name] = kind(templates=own.templates, max_tokens=own.max_tokens)
    shown: list[tuple[Asked, str]] = []
    for (rollouts, outcomes), configured in zip(halves, contexts, strict=True):
        rendered = {name: way.render(chat, rollouts, outcomes) for name, way in ways.items()}
        for name, table in {"configured": configured, **rendered}.items():
            for q, group in enumerate(table.ids):
                rate = float(outcomes.pass_rates[q])
                read = next((ids for ids in group if ids), ())
                asked[name].append(Asked(rollouts.prompts[q], rate, read))
                if name == "configured":
                    shown.append((asked[name][-1], _demonstration(model, rollouts, outcomes, q)))
    shown = [(one, text) for one, text in shown if one.ids and text]
    for (one, _), (_, other) in zip(shown, shown[1:] + shown[:1], strict=True):
        asked["another"].append(one._replace(ids=own.show(chat, one.prompt, other)))
    found = {name: [one for one in many if one.ids] for name, many in asked.items()}
    return {name: _accuracy(model, many) for name, many in found.items() if len(many) > 1}


def _accuracy(model: PolicyOptimizer, asked: Sequence[Asked]) -> Telling:
    # Keys by place, for draws of their own.
    prompts = [
        replace(one.prompt, key=f"told/{place}/{one.prompt.key}", ids=one.ids)
        for place, one in enumerate(asked)
    ]
    rollouts = model.rollout.sample(model.policy, prompts, model.sampling.at(0))
    told = model.judge(rollouts).pass_rates.tolist()
    without = [one.rate for one in asked]
    return Telling(
        without=score_interval(without),
        told=score_interval(told),
        gain=mean_interval([a - b for a, b in zip(told, without, strict=True)]),
    )
