"""The forwards of one optimizer step: student, teacher and reference on its micro-batches."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from scsdpo.teacher import Teacher

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
        prompts = {
            "student": batch.student_prompts(),
            "teacher": [ids for group in batch.teacher.ids for ids in group],
            "reference": [ids for group in batch.reference.ids for ids in group],
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
        self.reads = {
            "teacher": batch.plan.needs_teacher.flatten(),
            "reference": batch.plan.needs_reference.flatten(),
        }
        """[R] bool: the rows whose credit reads them."""
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
        self._teachers: dict[str, list[Runner]] = {}
        self._runs = self._asked()
        self._kept: dict[str, deque[TeacherOutput]] = {slot: deque() for slot in self.reads}

    def _asked(self) -> dict[str, Iterator[bool]]:
        """Whether each teacher runs on each micro-batch; under shards on all ranks, if on any."""
        here = torch.tensor(
            [
                [float(reads[micro].any()) for micro in self.micro_batches]
                for reads in self.reads.values()
            ]
        )
        asked = all_max(here) if is_sharded(self.policy) else here
        return {
            slot: iter(row.bool().tolist()) for slot, row in zip(self.reads, asked, strict=True)
        }

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
        head = Head.of(linear)
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
        teacher, reads = self.teachers[slot], self.reads[slot]
        some = [row for row, read in zip(micro, reads[micro].tolist(), strict=True) if read]
        nothing = TeacherOutput(hidden=(), heads=(), combine=teacher.combine)
        if not next(self._runs[slot]):
            return nothing
        with self.timer("teacher"):
            runners = self._runners(slot)
            runs = [runner.run(some, self._with_head(_both)) for runner in runners]
            for runner in runners:
                runner.done(some)
            if not some:
                return nothing
            # Rows that it does not read keep zeros: uniform logits, and no credit reads them.
            here = self.of_tokens(micro, reads[:, None].expand_as(self.batch.sampled))
            return TeacherOutput(
                hidden=tuple(_place(hidden, here) for hidden, _ in runs),
                heads=tuple(head for _, head in runs),
                combine=teacher.combine,
            )

    def _runners(self, slot: str) -> list[Runner]:
        """Per set of weights of a teacher, the rows that it reads."""
        if slot not in self._teachers:
            reading = self.reads[slot] & self.chosen
            self.timer.count("teacher", self._tokens(slot, reading))
            self._teachers[slot] = [
                self._runner(slot, reading, weights)
                for weights in self.teachers[slot].trunks(self.policy)
            ]
        return self._teachers[slot]


def _both(hidden: Tensor, linear: nn.Linear, head: Head) -> tuple[Tensor, Head]:
    return hidden, head


def _place(values: Tensor, here: Tensor) -> Tensor:
    """Rows of `values` at the True places of `here` [N], zeros elsewhere."""
    if bool(here.all()):
        return values
    full = values.new_zeros((len(here), *values.shape[1:]))
    full[here] = values
    return full
