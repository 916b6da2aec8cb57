"""The one loss: credit in, gradients out, a chunk of tokens at a time."""

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
"""Most of one [n, V] table of logits: one for the student, whose gradient takes its place, and one
a trunk of its teachers are alive. Each chunk adds to the head's whole gradient. On a GPU it is at
most a 128th of the memory, if that is more than a block."""
FEWEST_ROWS = 128
"""Tokens of a chunk even if the vocabulary is large: each chunk passes over the whole head."""
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Of the part of a chunk that everything between the products works on; on CPU it stays in the
cache."""


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
    """[N]: question weight / denominator, the same at every token of a rollout."""
    weight: Tensor
    """[N]: token weight."""
    signals: Signals
    """The step's tables."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherOutput:
    """A teacher's side of the kernel: trunks already run, and a rule that combines their logits."""

    hidden: tuple[Tensor, ...]
    """Per trunk [N, D]."""
    heads: tuple[Head, ...]
    """Per trunk, the head that goes with it."""
    combine: Callable[[Callable[[], TokenLogits], tuple[TokenLogits, ...]], TokenLogits]
    """(student, computed when asked for; trunks) -> the target distribution."""

    def logits(self, part: slice, temperature: float, buffers: Buffers) -> tuple[Tensor, ...]:
        """Per trunk, the logits [n, V] at the tokens of `part`."""
        return tuple(
            TokenLogits.of(hidden[part], head, temperature, buffers).logits
            for hidden, head in zip(self.hidden, self.heads, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Observation:
    """A block of n tokens as the kernel saw it; its tables [n, V] are written over afterwards."""

    chunk: Chunk
    gradient: Tensor
    """[n, V]: d loss / d (h W^T + b), with all that multiplies the loss."""
    temperature: float
    objective: Tensor
    """[n]: the token's loss before any of these factors."""
    entropy: Tensor
    """[n]: H(S)."""
    scale: Tensor
    """[n]: question weight / denominator."""
    token_weight: Tensor
    """[n]."""
    importance: Tensor
    """[n]."""

    @property
    def credit(self) -> Tensor:
        """[n, V]: -d loss / d z, z the temperature-scaled logits; a table of its own."""
        return self.gradient * -self.temperature


Observer = Callable[[Observation], None]
"""Looks at a block of tokens, and changes nothing in it."""


def unobserved(seen: Observation) -> None:
    """Nobody looks."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective:
    """What the kernel needs to know of the strategies."""

    credit: Callable[[Chunk], Credit]
    """The advantage's plan."""
    importance: Callable[[Chunk], Tensor]
    """Detached factor [n] on the token's loss."""
    teacher: TeacherOutput
    reference: TeacherOutput
    temperature: float
    others: tuple[TeacherOutput, ...] = ()
    """The teacher's, after its further contexts."""
    observe: Observer = unobserved


class LossOutput(NamedTuple):
    """The loss and, per token [N] and detached, what the log shows.

    A plain tuple: in it FSDP2 finds the loss, at which a backward will start.
    """

    loss: Tensor
    """Scalar: sum of scale * importance * objective, with a gradient."""
    objective: Tensor
    logprob: Tensor
    """log S(y)."""
    entropy: Tensor
    """H(S), nats."""
    importance: Tensor
    elsewhere: Tensor = torch.zeros(0, dtype=torch.bool)
    """The sampler sent this token to other experts; [0] where it did not say."""


class HeadGradient:
    """The head's gradient, summed in one table over the micro-batches of a step.

    The last of their backwards gives it away; all of them must be scaled alike.

    Args:
        micro_batches: how many there will be.
    """

    def __init__(self, micro_batches: int) -> None:
        self.left = micro_batches
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def start(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make the tables, in float32 at least; a frozen head gets none, and costs nothing."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self.weight is None and weight.requires_grad:
            self.weight = torch.zeros_like(weight, dtype=wide)
        if self.bias is None and bias is not None and bias.requires_grad:
            self.bias = torch.zeros_like(bias, dtype=wide)

    def give(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight's and bias's gradient, times `factor`, in the last backward; before, none."""
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

    The gradient w.r.t. hidden states and head is made in the forward, chunk by chunk, so that
    never more than one chunk of logits per model is alive: memory is O(chunk * V), not O(N * V).

    Args:
        hidden: of the student.
        linear: its head, which gets the gradient.
        head: `linear` in the dtype of its product.
        tokens: of the micro-batch.
        objective: of the micro-batch.
        gradient: of the head, over the step.

    Shapes:
        hidden [N, D] -> scalar loss and four [N] logs; N = 0 gives 0 and zero gradients.
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
    """Tokens of a chunk on a device of a kind, `cpu` or `cuda`, with so many bytes."""
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
            work = _Work(hidden.detach(), head, tokens, objective)
            gradient.start(weight, bias)
            gradients = _Gradients(torch.empty_like(hidden), gradient, weight.dtype)
            for part in chunks(len(hidden), len(weight), hidden.device):
                gradients.add(part, work.hidden[part], work.run(part), head.weight)
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        kept = torch.promote_types(hidden.dtype, torch.float32)
        rows = torch.cat(work.logs, dim=1) if work.logs else hidden.new_zeros((4, 0), dtype=kept)
        logs = rows.unbind()
        ctx.mark_non_differentiable(*logs)
        return work.loss.to(kept), *logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the credit loss gave its gradients away: call backward once only")
        return (*gradients.times(grad_loss), None, None, None, None)


class _Work:
    """Runs chunk after chunk in the same buffers; sums the loss and keeps what the log shows."""

    def __init__(self, hidden: Tensor, head: Head, tokens: Tokens, objective: Objective) -> None:
        self.hidden = hidden.to(head.weight.dtype)
        self.head, self.tokens, self.objective = head, tokens, objective
        self.products, self.between = Buffers(), Buffers()
        self.loss = hidden.new_zeros((), dtype=torch.float64)
        self.logs: list[Tensor] = []

    def run(self, part: slice) -> Tensor:
        """[n, V]: d loss / d (h W^T + b) at the tokens of `part`, until the next chunk."""
        self.products.recycle()
        objective = self.objective

        def ask(output: TeacherOutput) -> Callable[[], tuple[Tensor, ...]]:
            """The output's products for this chunk, made when first asked for."""
            return cache(partial(output.logits, part, objective.temperature, self.products))

        made = TokenLogits.of(self.hidden[part], self.head, objective.temperature, self.products)
        outputs = (objective.teacher, objective.reference, *objective.others)
        tables = [ask(output) for output in outputs]
        for block in _slices(*self._block_size(made.logits)):
            self.between.recycle()
            student = TokenLogits(made.logits[block], self.between)
            inside = slice(part.start + block.start, part.start + block.stop)
            teacher, reference, *others = (
                cache(partial(self._target, output, made_of, block, student))
                for output, made_of in zip(outputs, tables, strict=True)
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

    def _block_size(self, logits: Tensor) -> tuple[int, int]:
        rows = BLOCK_BYTES[logits.device.type] // (4 * logits.shape[1])
        return len(logits), max(rows, 1)

    def _target(
        self,
        output: TeacherOutput,
        tables: Callable[[], tuple[Tensor, ...]],
        block: slice,
        student: TokenLogits,
    ) -> TokenLogits:
        """The distribution that a teacher or reference gives at the tokens of a block."""
        trunks = tuple(TokenLogits(table[block], self.between) for table in tables())
        return output.combine(lambda: student, trunks)

    def _gradient(self, chunk: Chunk, inside: slice) -> Tensor:
        """[n, V] of a block: d loss / d (h W^T + b)."""
        student, credit = chunk.student, self.objective.credit(chunk)
        importance, entropy = self.objective.importance(chunk), student.entropy()
        scale, weight = self.tokens.scale[inside], self.tokens.weight[inside]
        factor = (scale * weight).to(chunk.logprob.dtype) * importance
        self.logs.append(torch.stack([credit.objective, chunk.logprob, entropy, importance]))
        self.loss += weighted(factor, credit.objective).sum()
        factor = factor / self.objective.temperature
        mass = weighted(factor, credit.mass(student))
        watched = self.objective.observe is not unobserved
        # The last use of the student's probabilities, unless somebody looks: the gradient takes
        # their place.
        gradient = (student.probs.clone() if watched else student.probs).mul_(mass[:, None])
        credit.subtract(gradient, factor, student)
        if watched:
            seen = Observation(
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
    """Of the loss w.r.t. hidden states and head."""

    hidden: Tensor
    head: HeadGradient
    dtype: torch.dtype
    """Of the head."""

    def add(self, part: slice, hidden: Tensor, logits: Tensor, weight: Tensor) -> None:
        """Through the head's product, from the gradient w.r.t. the logits of `part` [n, V]."""
        narrow, head = logits.to(weight.dtype), self.head
        multiply(narrow, weight, self.hidden[part])
        if head.weight is not None:
            add_product(narrow.T, hidden, head.weight)
        if head.bias is not None:
            head.bias.add_(logits.sum(0))

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Chain rule with d / d loss; called once, and the tables are given away."""
        hidden = self.hidden.mul_(factor.to(self.hidden.dtype))
        return (hidden, *self.head.give(factor, self.dtype))
