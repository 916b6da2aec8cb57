"""One batch from the inside: what each token gets, without taking a step."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from scsdpo.advantage import Batch
from scsdpo.loss import Observation, Observer
from scsdpo.policy import CausalLM
from scsdpo.training.step import Update


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchTrace:
    """What a step on one batch would do. Q questions, G rollouts, L longest response.

    Token tables [Q, G, L] are float64, in nats where they are log-probs, and nan where nothing was
    computed: padding, and rollouts that no credit can reach.
    """

    batch: Batch
    """Judged responses, teacher and reference contexts, plan and weights."""
    loss: float
    """The logged loss: sum of scale * importance * objective over all tokens."""
    credit: Tensor
    """-d loss / d z(y) at the sampled token y, z = logits / temperature; question and rollout
    weight, importance, token weight and denominator included. > 0: y becomes more likely."""
    magnitude: Tensor
    """sum_v |d loss / d z(v)| over the vocabulary: how hard the step pulls at this position."""
    objective: Tensor
    """The token's loss before any of these factors, e.g. its divergence."""
    logprob: Tensor
    """log S(y)."""
    teacher_logprob: Tensor
    """log T(y); nan where the credit does not read the teacher."""
    entropy: Tensor
    """H(S)."""


def trace_update(
    update: Update, policy: CausalLM, batch: Batch, *, max_tokens: int, observe: Observer
) -> BatchTrace:
    """Run the one kernel over `batch` and write down what it makes of every token.

    Args:
        update: of the strategies.
        policy: with its weights; gets no gradient.
        batch: what is traced.
        max_tokens: budget of a micro-batch; changes no number.
        observe: sees each block with its credit over the whole vocabulary, too.
    """
    shape = batch.judged.responses.ids.shape
    names = ("credit", "magnitude", "objective", "logprob", "teacher_logprob", "entropy")
    tables = {
        name: torch.full(shape, torch.nan, dtype=torch.float64, device=batch.ids.device)
        for name in names
    }
    look = partial(_write, tables, batch.plan.needs_teacher.flatten(), observe)
    rows, loss = list(range(shape[0] * shape[1])), 0.0
    with torch.no_grad():
        seen = replace(update, observe=look)
        for output, _ in seen.losses(policy, batch, rows, max_tokens):
            loss += float(output.loss)
    return BatchTrace(batch=batch, loss=loss, **tables)


def _write(tables: dict[str, Tensor], taught: Tensor, observe: Observer, seen: Observation) -> None:
    chunk, credit = seen.chunk, seen.credit
    values = {
        "credit": credit.gather(-1, chunk.ids[:, None])[:, 0],
        "magnitude": credit.abs().sum(-1),
        "objective": seen.objective,
        "logprob": chunk.logprob,
        "entropy": seen.entropy,
    }
    at = chunk.places
    for name, value in values.items():
        tables[name].view(-1)[at] = value.double()
    read = taught[chunk.rollout]
    if bool(read.any()):
        told = chunk.teacher().logprob(chunk.ids).double()
        tables["teacher_logprob"].view(-1)[at[read]] = told[read]
    observe(seen)
