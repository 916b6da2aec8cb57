"""The one loss: credit in, gradients out, a chunk of tokens at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scsdpo.loss.credit import Chunk, Credit
from scsdpo.loss.logits import TokenLogits

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Size of one [n, V] float32 buffer; about five of them are alive at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """The N response tokens of a micro-batch, in the order of the hidden states."""

    ids: Tensor
    """[N] int64: sampled tokens."""
    rollout: Tensor
    """[N] int64: flat index of their rollout."""
    scale: Tensor
    """[N]: question weight x token weight / denominator; everything that multiplies the loss."""
    sampling_logprobs: Tensor
    """[N]: log-prob under the distribution they were drawn from."""
    old_logprobs: Tensor
    """[N]: log-prob under the policy before the batch's first update; nan: this is the first."""
    sequence_log_ratio: Tensor
    """[N]: see `Chunk`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Voice:
    """A teacher's side of the kernel: trunks already run, and a rule that combines their logits."""

    hidden: tuple[Tensor, ...]
    """Per trunk [N, D]."""
    heads: tuple[nn.Linear, ...]
    """Per trunk, the head that goes with it."""
    combine: Callable[[Callable[[], TokenLogits], tuple[TokenLogits, ...]], TokenLogits]
    """(student, computed when asked for; trunks) -> the target distribution."""

    def logits(
        self, part: slice, student: Callable[[], TokenLogits], temperature: float
    ) -> TokenLogits:
        """The target at the tokens of `part`."""
        trunks = tuple(
            TokenLogits.of(hidden[part], head, temperature)
            for hidden, head in zip(self.hidden, self.heads, strict=True)
        )
        return self.combine(student, trunks)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective:
    """What the kernel needs to know of the strategies."""

    credit: Callable[[Chunk], Credit]
    """The advantage's plan."""
    importance: Callable[[Tensor], Tensor]
    """log S(y) - log S_rollout(y) [n] -> detached factor [n] on the token's loss."""
    teacher: Voice
    reference: Voice
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossOutput:
    """The loss and, per token [N] and detached, what the log shows."""

    loss: Tensor
    """Scalar: sum of scale * importance * objective, with a gradient."""
    objective: Tensor
    logprob: Tensor
    """log S(y)."""
    entropy: Tensor
    """H(S), nats."""


def credit_loss(
    hidden: Tensor, head: nn.Linear, tokens: Tokens, objective: Objective
) -> LossOutput:
    """Loss = sum_t scale_t * importance_t * objective_t, with the gradient that credit defines.

    The gradient w.r.t. hidden states and head is made in the forward, chunk by chunk, so that
    never more than one chunk of logits per model is alive: memory is O(chunk * V), not O(N * V).
    The head's gradient is summed in float32 at least; a frozen head costs nothing.

    Shapes:
        hidden [N, D] -> scalar loss and three [N] logs; N = 0 gives 0 and zero gradients.
    """
    outputs = _CreditLoss.apply(hidden, head.weight, head.bias, head, tokens, objective)
    return LossOutput(loss=outputs[0], objective=outputs[1], logprob=outputs[2], entropy=outputs[3])


def chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of 0..count whose [n, V] float32 buffer stays within `CHUNK_BYTES`."""
    size = max(CHUNK_BYTES[device.type] // (4 * vocabulary), 1)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _CreditLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: nn.Linear,
        tokens: Tokens,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        accumulate = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if weight.requires_grad else None
        grad_bias = (
            torch.zeros_like(bias, dtype=accumulate)
            if bias is not None and bias.requires_grad
            else None
        )
        loss, logs = hidden.new_zeros((), dtype=torch.float64), []
        for part in chunks(len(hidden), len(weight), hidden.device):
            student = TokenLogits.of(hidden[part], head, objective.temperature)
            credit, scale, logprob = _credit(part, student, tokens, objective)
            logs.append(torch.stack([credit.objective, logprob, student.entropy()]))
            loss += (scale * credit.objective).sum()
            gradient = credit.logits_gradient(student).mul_(
                (scale / objective.temperature)[:, None].to(student.logits.dtype)
            )
            narrow = gradient.to(hidden.dtype)
            grad_hidden[part] = narrow @ weight.to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, narrow.T, hidden[part])
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias, weight.dtype)
        kept = torch.promote_types(hidden.dtype, torch.float32)
        rows = torch.cat(logs, dim=1) if logs else hidden.new_zeros((3, 0), dtype=kept)
        values, logprobs, entropies = rows.unbind()
        ctx.mark_non_differentiable(values, logprobs, entropies)
        return loss.to(kept), values, logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, dtype = ctx.gradients
        factor = grad_loss.to(grad_hidden.dtype)
        return (
            grad_hidden * factor,
            None if grad_weight is None else (grad_weight * grad_loss).to(dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total += a @ b; in one pass where the dtypes allow it."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _credit(
    part: slice, student: TokenLogits, tokens: Tokens, objective: Objective
) -> tuple[Credit, Tensor, Tensor]:
    """Credit, its factor [n] and log S(y) [n] for the tokens of `part`."""
    temperature = objective.temperature
    logprob = student.logprob(tokens.ids[part])
    old = tokens.old_logprobs[part].to(logprob.dtype)
    chunk = Chunk(
        student=student,
        teacher=cache(lambda: objective.teacher.logits(part, lambda: student, temperature)),
        reference=cache(lambda: objective.reference.logits(part, lambda: student, temperature)),
        ids=tokens.ids[part],
        rollout=tokens.rollout[part],
        log_ratio=torch.where(old.isnan(), 0.0, logprob - old),
        sequence_log_ratio=tokens.sequence_log_ratio[part].to(logprob.dtype),
    )
    sampled = tokens.sampling_logprobs[part].to(logprob.dtype)
    factor = objective.importance(logprob - sampled)
    return objective.credit(chunk), tokens.scale[part].to(logprob.dtype) * factor, logprob
