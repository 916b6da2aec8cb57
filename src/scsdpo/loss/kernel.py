"""The loss kernel: it turns credit into gradients, a chunk of tokens at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scsdpo.loss.credit import Chunk, Credit, weighted
from scsdpo.loss.logits import Buffers, Head, TokenLogits, add_product, multiply
from scsdpo.loss.signals import Signals

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**30}
"""Largest table of logits [n, V] of a chunk, in bytes. One table is alive for the student, whose
gradient replaces it, and one for each set of teachers' weights. On a GPU the limit is a 128th of
the memory, if that is smaller but still more than a block."""
FEWEST_ROWS = 128
"""Least number of tokens of a chunk, for each chunk reads the head and adds to its gradient."""
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Largest block of a chunk's rows, in bytes. All operations between the matrix products run block
by block; on CPU a block stays in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """The N response tokens of a micro-batch, in the order of the hidden states."""

    ids: Tensor
    """[N] int64: sampled tokens."""
    places: Tensor
    """[N] int64: flat index into the step's tables [R, L]."""
    rollouts: Sequence[int]
    """[N] the rollouts that they belong to, on the host."""
    scale: Tensor
    """[N]: weight of the rollout / denominator, equal at all tokens of a rollout."""
    weight: Tensor
    """[N]: token weight."""
    signals: Signals
    """The step's tables."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherOutput:
    """Hidden states of a teacher's weights, and the rule that combines their logits."""

    hidden: tuple[Tensor, ...]
    """[N, D] for each set of weights."""
    heads: tuple[Head, ...]
    """The head of each set of weights."""
    combine: Callable[[Callable[[], TokenLogits], tuple[TokenLogits, ...]], TokenLogits]
    """`Teacher.combine`: (the student's logits, computed if called; logits of each set of weights)
    -> the target distribution."""

    def logits(self, part: slice, temperature: float, buffers: Buffers) -> tuple[Tensor, ...]:
        """Logits [n, V] of each set of weights at the tokens of `part`."""
        return tuple(
            TokenLogits.of(hidden[part], head, temperature, buffers).logits
            for hidden, head in zip(self.hidden, self.heads, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ObservedBlock:
    """A block of n tokens with its gradient, for an `Observer`.

    Its tables [n, V] are overwritten when the observer has returned.
    """

    chunk: Chunk
    gradient: Tensor
    """[n, V]: d loss / d (h W^T + b), with all factors of the loss."""
    temperature: float
    objective: Tensor
    """[n]: the token's loss without any factor."""
    entropy: Tensor
    """[n]: H(S), nats."""
    scale: Tensor
    """[n]: weight of the rollout / denominator."""
    token_weight: Tensor
    """[n]: token weight."""
    importance: Tensor
    """[n]: importance weight."""

    @property
    def credit(self) -> Tensor:
        """[n, V]: -d loss / d z, z the logits divided by the temperature; a new table."""
        return self.gradient * -self.temperature


Observer = Callable[[ObservedBlock], None]
"""Is called with each block of tokens; it must not change anything in it."""


def unobserved(seen: ObservedBlock) -> None:
    """The observer that does nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective:
    """The strategies' part of the loss: credit, importance, and the teachers' outputs."""

    credit: Callable[[Chunk], Credit]
    """`Plan.credit` of the advantage."""
    importance: Callable[[Chunk], Tensor]
    """Detached factor [n] on the token's loss."""
    teacher: TeacherOutput
    reference: TeacherOutput
    temperature: float
    others: tuple[TeacherOutput, ...] = ()
    """Outputs of the teacher after its further contexts."""
    observe: Observer = unobserved


class LossOutput(NamedTuple):
    """The loss, and detached figures [N] of each token for the log.

    It is a plain tuple, in which FSDP2 finds the loss, where the backward will start.
    """

    loss: Tensor
    """Scalar: sum of scale * importance * objective, with a gradient."""
    objective: Tensor
    logprob: Tensor
    """log S(y), nats."""
    entropy: Tensor
    """H(S), nats."""
    importance: Tensor
    elsewhere: Tensor = torch.zeros(0, dtype=torch.bool)
    """[N] the sampler sent this token to other experts; [0] if it did not report its experts."""


class HeadGradient:
    """The head's gradient, summed in one table over the micro-batches of a step.

    The last micro-batch's backward returns it, so that all must have the same factor on the loss.

    Args:
        micro_batches: number of micro-batches of the step.
    """

    def __init__(self, micro_batches: int) -> None:
        self.left = micro_batches
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def start(self, weight: Tensor, bias: Tensor | None) -> None:
        """Allocate the tables, in float32 at least; a frozen head needs none."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self.weight is None and weight.requires_grad:
            self.weight = torch.zeros_like(weight, dtype=wide)
        if self.bias is None and bias is not None and bias.requires_grad:
            self.bias = torch.zeros_like(bias, dtype=wide)

    def give(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias times `factor`, in the last backward; None in earlier ones.

        The tables are freed.
        """
        self.left -= 1
        if self.left:
            return None, None
        made = [None if g is None else g.mul_(factor).to(dtype) for g in (self.weight, self.bias)]
        self.weight = self.bias = None
        return made[0], made[1]


def credit_loss(
    hidden: Tensor,
    linear: nn.Linear,
    head: Head,
    *,
    tokens: Tokens,
    objective: Objective,
    gradient: HeadGradient,
) -> LossOutput:
    """Loss = sum_t scale_t * importance_t * objective_t, with the gradient that credit defines.

    The gradient w.r.t. hidden states and head is computed in the forward, chunk by chunk, so that
    at most one chunk of logits per model is alive: memory is O(chunk * V), not O(N * V).

    Args:
        hidden: the student's hidden states.
        linear: the student's head, which gets the gradient.
        head: `linear` in the dtype of its product.
        tokens: the micro-batch's tokens.
        objective: the strategies' part of the loss.
        gradient: sums the head's gradient over the step.

    Shapes:
        hidden [N, D] -> scalar loss and four figures [N]; N = 0 gives 0 and zero gradients.
    """
    arguments = (hidden, linear.weight, linear.bias, head, gradient, tokens, objective)
    loss, objective_values, logprob, entropy, importance = _CreditLoss.apply(*arguments)
    return LossOutput(
        loss=loss,
        objective=objective_values,
        logprob=logprob,
        entropy=entropy,
        importance=importance,
    )


def chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of 0..count whose [n, V] float32 table stays within `CHUNK_BYTES`."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    return _slices(count, chunk_rows(vocabulary, device.type, memory))


def chunk_rows(vocabulary: int, kind: str, memory: int) -> int:
    """Tokens of a chunk.

    Args:
        vocabulary: V.
        kind: type of the device, `cpu` or `cuda`.
        memory: memory of a GPU, in bytes.
    """
    most = CHUNK_BYTES[kind]
    if kind == "cuda":
        most = max(min(most, memory // 128), BLOCK_BYTES[kind])
    return max(most // (4 * vocabulary), FEWEST_ROWS)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _CreditLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        gradient: HeadGradient,
        tokens: Tokens,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            runner = _ChunkRunner(hidden.detach(), head, tokens, objective)
            gradient.start(weight, bias)
            gradients = _Gradients(torch.empty_like(hidden), gradient, weight.dtype)
            for part in chunks(len(hidden), len(weight), hidden.device):
                gradients.add(part, runner.hidden[part], runner.run(part), head.weight)
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        kept = torch.promote_types(hidden.dtype, torch.float32)
        empty = hidden.new_zeros((4, 0), dtype=kept)
        logs = (torch.cat(runner.logs, dim=1) if runner.logs else empty).unbind()
        ctx.mark_non_differentiable(*logs)
        return runner.loss.to(kept), *logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the credit loss keeps its gradients for one backward: call it once")
        return (*gradients.times(grad_loss), None, None, None, None)


class _ChunkRunner:
    """Runs chunk after chunk in the same buffers, sums the loss, and keeps the tokens' figures."""

    def __init__(self, hidden: Tensor, head: Head, tokens: Tokens, objective: Objective) -> None:
        self.hidden = hidden.to(head.weight.dtype)
        self.head, self.tokens, self.objective = head, tokens, objective
        self.products, self.between = Buffers(), Buffers()
        self.loss = hidden.new_zeros((), dtype=torch.float64)
        self.logs: list[Tensor] = []

    def run(self, part: slice) -> Tensor:
        """[n, V]: d loss / d (h W^T + b) at the tokens of `part`; valid until the next chunk."""
        self.products.recycle()
        objective, temperature = self.objective, self.objective.temperature
        made = TokenLogits.of(self.hidden[part], self.head, temperature, self.products)
        outputs = (objective.teacher, objective.reference, *objective.others)
        # Computed once a chunk, if a credit asks for it.
        tables = [cache(partial(each.logits, part, temperature, self.products)) for each in outputs]
        rows = max(BLOCK_BYTES[made.logits.device.type] // (4 * made.logits.shape[1]), 1)
        for block in _slices(len(made.logits), rows):
            self.between.recycle()
            student = TokenLogits(made.logits[block], self.between)
            inside = slice(part.start + block.start, part.start + block.stop)
            teacher, reference, *others = (
                cache(partial(self._target, output, logits, block, student))
                for output, logits in zip(outputs, tables, strict=True)
            )
            gradient = self._gradient(
                Chunk(
                    student=student,
                    teacher=teacher,
                    reference=reference,
                    others=tuple(others),
                    ids=self.tokens.ids[inside],
                    logprob=student.logprob(self.tokens.ids[inside]),
                    places=self.tokens.places[inside],
                    rollouts=frozenset(self.tokens.rollouts[inside]),
                    signals=self.tokens.signals,
                ),
                inside,
            )
            made.logits[block] = gradient
        return made.logits

    def _target(
        self,
        output: TeacherOutput,
        tables: Callable[[], tuple[Tensor, ...]],
        block: slice,
        student: TokenLogits,
    ) -> TokenLogits:
        """The distribution of a teacher or reference at the tokens of a block."""
        teachers = tuple(TokenLogits(table[block], self.between) for table in tables())
        return output.combine(lambda: student, teachers)

    def _gradient(self, chunk: Chunk, inside: slice) -> Tensor:
        """[n, V]: d loss / d (h W^T + b) of a block."""
        student, credit = chunk.student, self.objective.credit(chunk)
        importance, entropy = self.objective.importance(chunk), student.entropy()
        scale, weight = self.tokens.scale[inside], self.tokens.weight[inside]
        factor = (scale * weight).to(chunk.logprob.dtype) * importance
        self.logs.append(torch.stack([credit.objective, chunk.logprob, entropy, importance]))
        self.loss += weighted(factor, credit.objective).sum()
        factor = factor / self.objective.temperature
        mass = weighted(factor, credit.mass(student))
        observed = self.objective.observe is not unobserved
        # Without an observer nothing reads the student's probabilities afterwards, so the gradient
        # overwrites them.
        gradient = (student.probs.clone() if observed else student.probs).mul_(mass[:, None])
        credit.subtract(gradient, factor, student)
        if observed:
            seen = ObservedBlock(
                chunk=chunk,
                gradient=gradient,
                temperature=self.objective.temperature,
                objective=credit.objective,
                entropy=entropy,
                scale=scale,
                token_weight=weight,
                importance=importance,
            )
            self.objective.observe(seen)
        return gradient


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """Gradients of the loss w.r.t. hidden states and head."""

    hidden: Tensor
    head: HeadGradient
    dtype: torch.dtype
    """dtype of the head's gradient."""

    def add(self, part: slice, hidden: Tensor, logits: Tensor, weight: Tensor) -> None:
        """Add the gradients of one chunk.

        Args:
            part: the chunk's tokens.
            hidden: [n, D] their hidden states.
            logits: [n, V] gradient w.r.t. h W^T + b.
            weight: W, the head's weight.
        """
        narrow, head = logits.to(weight.dtype), self.head
        multiply(narrow, weight, self.hidden[part])
        if head.weight is not None:
            add_product(narrow.T, hidden, head.weight)
        if head.bias is not None:
            head.bias.add_(logits.sum(0))

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias times d / d loss; called once."""
        hidden = self.hidden.mul_(factor.to(self.hidden.dtype))
        return (hidden, *self.head.give(factor, self.dtype))
