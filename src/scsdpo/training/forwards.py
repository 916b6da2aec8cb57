"""The forwards of one optimizer step: student, teacher and reference on its micro-batches."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from scsdpo.advantage import Batch
from scsdpo.distributed import all_max
from scsdpo.loss import Buffers, Head, HeadGradient, LossOutput, TeacherOutput, TokenLogits
from scsdpo.metrics import PhaseTimer
from scsdpo.policy import CausalLM, Rows, Runner, Weights
from scsdpo.policy.sharding import is_sharded
from scsdpo.teacher import Context, Teacher

T = TypeVar("T")
Loss = Callable[..., LossOutput]
"""`credit_loss` of a micro-batch; what is left to give is the head and its gradient."""
LogitsOf = Callable[[slice, Buffers], TokenLogits]
"""Slice of a micro-batch's tokens -> their logits, made in the buffers."""


class Forwards:
    """Which rows an optimizer step runs, in which micro-batches, and what the models say of them.

    Args:
        policy: the student, and whose weights the teachers' may be.
        teachers: `teacher` and `reference`.
        batch: the rollouts and what is known of them.
        rows: those of this optimizer step; the active ones of them are run.
        max_tokens: tokens whose activations are alive at a time.
        timer: told when a teacher runs.
    """

    def __init__(
        self,
        policy: CausalLM,
        teachers: Mapping[str, Teacher],
        batch: Batch,
        rows: Sequence[int],
        *,
        max_tokens: int,
        timer: PhaseTimer,
    ) -> None:
        self.policy, self.teachers, self.batch, self.timer = policy, teachers, batch, timer
        prompts = {"student": batch.student_prompts()} | {
            slot: [ids for group in each.ids for ids in group]
            for slot, each in batch.contexts.items()
        }
        pad, self._max_tokens = policy.chat.pad_id, max_tokens
        self._rows = {
            slot: Rows(
                prompts=each,
                ids=batch.ids,
                present=batch.present,
                sampled=batch.sampled,
                pad_id=pad,
            )
            for slot, each in prompts.items()
        }
        self.reads = {slot: batch.reads(slot) for slot in batch.contexts}
        """[R] bool: the rows whose credit reads them."""
        self.others = [slot for slot in batch.contexts if slot.startswith("teacher/")]
        """The teacher's further contexts, in order."""
        active = batch.active
        self.index = torch.tensor(rows, dtype=torch.long, device=active.device)
        self.chosen = torch.zeros_like(active).index_fill_(0, self.index, True) & active
        """[R] bool: the rows that are run."""
        self.lengths = batch.sampled.sum(-1)
        self.temperature = batch.judged.responses.temperature
        self._student = self._runner("student", self.chosen)
        self.micro_batches = self._student.micro_batches()
        self._heads: dict[nn.Linear, Head] = {}
        self._measured: Runner | None = None
        self._pairs = list(self._paired())
        self._kept: dict[str, deque[TeacherOutput]] = {slot: deque() for slot in self.reads}

    def _paired(self) -> "Iterator[_Pair]":
        """Each pair of weights and context that some slot reads, once.

        Slots that read the same pair share its forwards. Whether two pairs are the same is told by
        weights and contexts, and not by what was rendered: it is the same on every rank.
        """
        pairs: list[_Pair] = []
        for slot, reads in self.reads.items():
            teacher = self.teachers[slot]
            parts = teacher.context.named
            name = slot.partition("/")[2]
            context = parts[name] if name in parts else next(iter(parts.values()))
            for weights in teacher.trunks(self.policy):
                same = [p for p in pairs if p.weights.same(weights) and p.context == context]
                if same:
                    same[0].slots.append(slot)
                    same[0].reads |= reads
                else:
                    pairs.append(_Pair(weights, context, [slot], reads.clone()))
        if pairs:
            here = torch.tensor(
                [[float(p.reads[micro].any()) for micro in self.micro_batches] for p in pairs]
            )
            asked = all_max(here) if is_sharded(self.policy) else here
            for pair, runs in zip(pairs, asked.bool().tolist(), strict=True):
                pair.runs = runs
        yield from pairs

    def _runner(self, slot: str, wanted: Tensor, weights: Weights | None = None) -> Runner:
        chosen = wanted.nonzero()[:, 0].tolist()
        return self.policy.runner(self._rows[slot], chosen, self._max_tokens, weights)

    def _tokens(self, slot: str, wanted: Tensor) -> int:
        rows = wanted.nonzero()[:, 0].tolist()
        return self._rows[slot].at(rows).distinct_tokens if rows else 0

    def _with_head(
        self, use: Callable[[Tensor, nn.Linear, Head], T]
    ) -> Callable[[Tensor, nn.Linear], T]:
        """`use`, which also wants the head in the dtype of its product."""
        return lambda hidden, linear: use(hidden, linear, self._cast(linear))

    def _cast(self, linear: nn.Linear) -> Head:
        """Once a step; but what needs no cast is under FSDP2 gone when its forward ends."""
        if linear in self._heads:
            return self._heads[linear]
        head = Head.of(linear).first(self.policy.vocabulary)
        if head.weight.dtype != linear.weight.dtype:
            self._heads[linear] = head
        return head

    def of_tokens(self, micro: Sequence[int], table: Tensor) -> Tensor:
        """[N]: the entries of `table` [R, L] at the micro-batch's sampled tokens, row-major."""
        return table[list(micro)][self.batch.sampled[list(micro)]]

    def losses(
        self, loss_of: Callable[[list[int]], Loss]
    ) -> Iterator[tuple[list[int], LossOutput]]:
        """The student's forward on each micro-batch, with its loss at the end; a gradient.

        The caller runs backward on each before asking for the next.

        Args:
            loss_of: of a micro-batch, from hidden states [N, D] and the head.
        """
        self.timer.count("student", self._tokens("student", self.chosen))
        gradient = HeadGradient(len(self.micro_batches))
        for micro in self.micro_batches:
            loss = partial(loss_of(micro), gradient=gradient)
            yield micro, self._student.run(micro, self._with_head(loss))
            self._student.done(micro)

    def student(self, micro: list[int]) -> LogitsOf:
        """The current policy on a micro-batch, without gradient; each micro-batch once."""
        if self._measured is None:
            current = self.policy.adapter.current()
            self._measured = self._runner("student", self.chosen, current)
        hidden, head = self._measured.run(micro, self._with_head(_both))
        self._measured.done(micro)
        return lambda part, buffers: TokenLogits.of(hidden[part], head, self.temperature, buffers)

    def in_step(self, slot: str) -> bool:
        """Whether the student must run because the slot's teacher may ask for it on some rank."""
        combines = type(self.teachers[slot]).combine is not Teacher.combine
        return combines and is_sharded(self.policy)

    def keep(self, slot: str, micro: list[int]) -> TeacherOutput:
        """Run a teacher on a micro-batch, and keep what it says until `take`."""
        output = self._run(slot, micro)
        self._kept[slot].append(output)
        return output

    def take(self, slot: str, micro: list[int]) -> TeacherOutput:
        """What the teacher says of the next micro-batch; what was kept is not run again."""
        return self._kept[slot].popleft() if self._kept[slot] else self._run(slot, micro)

    def _run(self, slot: str, micro: list[int]) -> TeacherOutput:
        teacher, pairs = self.teachers[slot], [p for p in self._pairs if slot in p.slots]
        outputs = [self._output(pair, slot, micro) for pair in pairs]
        found = [output for output in outputs if output is not None]
        if len(found) < len(outputs) or not found:
            return TeacherOutput(hidden=(), heads=(), combine=teacher.combine)
        return TeacherOutput(
            hidden=tuple(hidden for hidden, _ in found),
            heads=tuple(head for _, head in found),
            combine=teacher.combine,
        )

    def _output(self, pair: "_Pair", slot: str, micro: list[int]) -> tuple[Tensor, Head] | None:
        """Hidden states [N, D] and head of a pair on a micro-batch; None: nobody reads it there.

        Rows that it does not read keep zeros: uniform logits, and no credit reads them.
        """
        number = pair.asked.get(slot, 0)  # each slot asks for every micro-batch once, in order
        pair.asked[slot] = number + 1
        if not pair.runs[number]:
            return None
        if number in pair.shared:
            left, given = pair.shared.pop(number)
            if left > 1:
                pair.shared[number] = left - 1, given
            return given
        if pair.runner is None:
            reading = pair.reads & self.chosen
            self.timer.count("teacher", self._tokens(pair.slots[0], reading))
            pair.runner = self._runner(pair.slots[0], reading, pair.weights)
        some = [row for row, read in zip(micro, pair.reads[micro].tolist(), strict=True) if read]
        with self.timer("teacher"):
            hidden, head = pair.runner.run(some, self._with_head(_both))
            pair.runner.done(some)
        output: tuple[Tensor, Head] | None = None
        if some:
            here = self.of_tokens(micro, pair.reads[:, None].expand_as(self.batch.sampled))
            output = _place(hidden, here), head
        if len(pair.slots) > 1:
            pair.shared[number] = len(pair.slots) - 1, output
        return output


@dataclass(eq=False)
class _Pair:
    """Weights, and the context that they read."""

    weights: Weights
    context: Context
    slots: list[str]
    """Who reads it."""
    reads: Tensor
    """[R] bool: rows that one of them reads."""
    runs: list[bool] = field(default_factory=list)
    """By micro-batch, whether it runs; under shards on all ranks, if on any."""
    asked: dict[str, int] = field(default_factory=dict)
    """By slot, for how many micro-batches it was asked."""
    shared: dict[int, tuple[int, tuple[Tensor, Head] | None]] = field(default_factory=dict)
    """By number of the micro-batch, how many more slots will ask for it, and what they get."""
    runner: Runner | None = None


def _both(hidden: Tensor, linear: nn.Linear, head: Head) -> tuple[Tensor, Head]:
    return hidden, head


def _place(values: Tensor, here: Tensor) -> Tensor:
    """Rows of `values` at the True places of `here` [N], zeros elsewhere."""
    if bool(here.all()):
        return values
    full = values.new_zeros((len(here), *values.shape[1:]))
    full[here] = values
    return full
