"""Each token's credit in one batch, without taking a step."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from scsdpo.advantage import Batch
from scsdpo.loss import ObservedBlock, Observer
from scsdpo.policy import CausalLM
from scsdpo.training.step import Update


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchTrace:
    """One batch and the credit of each of its tokens. Q questions, G rollouts, L longest response.

    Tables [Q, G, L] are float64. Log-probs, objectives and entropies are in nats. Entries are nan
    where nothing was computed: at padding, and in rollouts that get no credit.
    """

    batch: Batch
    """Judged responses, teacher and reference contexts, plan and weights."""
    loss: float
    """The loss as it is logged: the sum of scale * importance * objective over all tokens."""
    credit: Tensor
    """-d loss / d z(y) at the sampled token y, z = logits / temperature. The weights of question,
    rollout and token, importance and the denominator are in it. > 0: y becomes more likely."""
    magnitude: Tensor
    """sum_v |d loss / d z(v)|, over the vocabulary."""
    objective: Tensor
    """The token's loss without these factors, e.g. its divergence."""
    logprob: Tensor
    """log S(y)."""
    teacher_logprob: Tensor
    """log T(y); nan where the credit does not read the teacher."""
    entropy: Tensor
    """H(S)."""


def trace_update(
    update: Update, policy: CausalLM, batch: Batch, *, max_tokens: int, observe: Observer
) -> BatchTrace:
    """Run the kernel over `batch` without gradient, and keep what it computes for each token.

    Args:
        update: computes the losses.
        policy: with its weights loaded.
        batch: the batch to trace.
        max_tokens: budget of a micro-batch; it changes no number.
        observe: is called, too, with each block and its credit over the whole vocabulary.
    """
    shape = batch.judged.responses.ids.shape
    names = ("credit", "magnitude", "objective", "logprob", "teacher_logprob", "entropy")
    tables = {
        name: torch.full(shape, torch.nan, dtype=torch.float64, device=batch.ids.device)
        for name in names
    }
    write = partial(_write, tables, batch.plan.needs_teacher.flatten(), observe)
    rows, loss = list(range(shape[0] * shape[1])), 0.0
    with torch.no_grad():
        for output, _ in replace(update, observe=write).losses(policy, batch, rows, max_tokens):
            loss += float(output.loss)
    return BatchTrace(batch=batch, loss=loss, **tables)


def _write(
    tables: dict[str, Tensor], taught: Tensor, observe: Observer, seen: ObservedBlock
) -> None:
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
