"""Measures the teacher's distance by correctness and pass rate (Figure 4 of SC-SDPO)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from scsdpo.advantage import Batch, Divergence, Plan, TopK
from scsdpo.analysis.module import AnalysisModule
from scsdpo.data import TaskDataModule
from scsdpo.errors import ConfigurationError
from scsdpo.loss import Chunk, Credit, DenseCredit, TokenLogits
from scsdpo.teacher import NoTeacher, contexts_of
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Judged, Prompt, Sampling

MEASURES = ("reverse_kl", "jsd", "log_teacher_over_student", "half_log_student_over_mixture")
"""sum S log(S/T) and JSD(S, T) on the support; log T(y)/S(y) and 1/2 log S(y)/M(y) at the sampled
token y; nats."""
BINS = 40
"""Bins of a histogram."""


@dataclass
class ResponseDistance:
    """One response that has a teacher prompt."""

    key: str
    pass_rate: float
    correct: bool
    tokens: int
    values: dict[str, float]
    """Each of `MEASURES` -> its mean over the response's tokens, nats."""


@dataclass
class Probe:
    """Gives credit 0, and writes the four measures of each token into tables.

    Args:
        mask: [R, L] bool: sampled tokens; the tables have its shape.
    """

    mask: Tensor
    tables: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tables = {name: torch.zeros(self.mask.shape).double() for name in MEASURES}

    def credit(self, chunk: Chunk) -> Credit:
        """Write the measures of the chunk's tokens into the tables."""
        # In float64: rounding of a tail near 0 would show in the reverse KL.
        student = TokenLogits(chunk.student.logits.double())
        teacher, ids = TokenLogits(chunk.teacher().logits.double()), chunk.ids
        support = TopK(k=100, tail=True)
        log_s, log_t = student.logprob(ids), teacher.logprob(ids)
        values = {
            "reverse_kl": support.credit(Divergence(alpha=1.0), student, teacher, ids).objective,
            "jsd": support.credit(Divergence(alpha=0.5), student, teacher, ids).objective,
            "log_teacher_over_student": log_t - log_s,
            "half_log_student_over_mixture": (log_s - torch.logaddexp(log_s, log_t) + math.log(2))
            / 2,
        }
        for name, value in values.items():
            self.tables[name].view(-1)[chunk.places.cpu()] = value.cpu()
        zeros = torch.zeros_like(chunk.student.logits)
        return DenseCredit(values=zeros, objective=torch.zeros_like(chunk.logprob))


class _Analysis(AnalysisModule):
    """Measures batches of questions, so many in all."""

    def __init__(self, model: PolicyOptimizer, rollouts: int, questions: int) -> None:
        super().__init__(model)
        self.left = questions
        self.sampling = replace(model.sampling.at(0), n=rollouts)

    def predict_step(self, prompts: Sequence[Prompt], batch_idx: int) -> list[ResponseDistance]:
        """One row per response that has a teacher prompt."""
        prompts = prompts[: self.left]
        self.left -= len(prompts)
        return measure_batch(self.model, prompts, self.sampling) if prompts else []


def measure_batch(
    model: PolicyOptimizer, prompts: Sequence[Prompt], sampling: Sampling
) -> list[ResponseDistance]:
    """Sample, judge, and measure the teacher on each response that has a teacher prompt."""
    return teacher_distances(model, model.judge(model.sample(prompts, sampling)))


def teacher_distances(model: PolicyOptimizer, judged: Judged) -> list[ResponseDistance]:
    """Measure the teacher on each response that has a teacher prompt."""
    prompts, group = judged.prompts, judged.rewards.shape[1]
    chat = model.policy.chat
    contexts = contexts_of(model.teacher, NoTeacher(), chat, judged)
    available = contexts["teacher"].available.to(judged.rewards.device)
    probe = Probe(judged.responses.sampled.flatten(0, 1))
    plan = Plan(active=available, needs_teacher=available, credit=probe.credit)
    batch = Batch.of(
        judged,
        plan,
        torch.ones_like(judged.rewards).double(),
        contexts,
        (len(prompts),),
    )
    update = replace(model.steps.update, needs=frozenset(), derivations=())
    budget = model.limits.token_budget(model.policy)
    with torch.no_grad():
        for _ in update.losses(model.policy, batch, list(range(len(batch.ids))), budget):
            pass
    lengths, mask = batch.sampled.sum(-1).tolist(), batch.sampled.cpu()
    rows = []
    for i in batch.active.nonzero()[:, 0].tolist():
        q, g = divmod(i, group)
        means = {name: float(t[i][mask[i]].mean()) for name, t in probe.tables.items()}
        rate, right = float(judged.pass_rates[q]), bool(judged.successes[q, g])
        rows.append(ResponseDistance(prompts[q].key, rate, right, lengths[i], means))
    return rows


def measure_distances(
    trainer: L.Trainer,
    model: PolicyOptimizer,
    data: TaskDataModule,
    questions: int,
    rollouts: int,
) -> dict[str, Any]:
    """The four measures of each response, their densities and their means by pass rate.

    Questions without a success are left out, as in the paper, whatever the context shows for them.

    Raises:
        ConfigurationError: if there is no teacher, or no question was solved.
    """
    if not model.teacher.exists:
        raise ConfigurationError(
            "model.teacher: NoTeacher has no distance to measure; choose EMA, Frozen or Live"
        )
    predicted = trainer.predict(_Analysis(model, rollouts, questions), data) or []
    rows = [row for batch in predicted for row in batch if row.pass_rate > 0]
    if not rows:
        raise ConfigurationError(
            f"none of {questions} questions was solved in {rollouts} tries, so that there is no "
            "teacher to measure: take easier questions or a better policy"
        )
    return {
        "policy": model.policy.name_or_path,
        "rollouts": rollouts,
        "measures": {name: _summary(rows, name) for name in MEASURES},
        "rows": [asdict(row) for row in rows],
    }


def _summary(rows: Sequence[ResponseDistance], name: str) -> dict[str, object]:
    """Histograms on common bins by correctness, and mean and std by pass rate."""
    values = torch.tensor([row.values[name] for row in rows]).double()
    correct = torch.tensor([row.correct for row in rows])
    rates = torch.tensor([row.pass_rate for row in rows]).double()
    low, high = float(values.min()), float(values.max())
    edges = torch.linspace(low, max(high, low + 1e-12), BINS + 1).double()

    def density(some: Tensor) -> list[float]:
        return torch.histogram(some, edges, density=True).hist.tolist() if len(some) else []

    groups = [(float(p), values[rates == p]) for p in rates.unique()]
    return {
        "edges": edges.tolist(),
        "density": {"correct": density(values[correct]), "incorrect": density(values[~correct])},
        "mean": {
            "correct": _mean(values[correct]),
            "incorrect": _mean(values[~correct]),
        },
        "by_pass_rate": [
            {"pass_rate": p, "n": len(v), "mean": _mean(v), "std": float(v.std(correction=0))}
            for p, v in groups
        ],
    }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
