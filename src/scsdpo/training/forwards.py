"""The forwards of one optimizer step: student, teacher and reference on its micro-batches."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scsdpo.loss import Buffers, Head, LossOutput, TeacherOutput, TokenLogits
from scsdpo.metrics import PhaseTimer
from scsdpo.policy import CausalLM, Rows
from scsdpo.teacher import Teacher
from scsdpo.training.batch import Batch
from scsdpo.training.micro_batches import token_budget

LogitsOf = Callable[[slice, Buffers], TokenLogits]
"""Slice of a micro-batch's tokens -> their logits, made in the buffers."""


class Forwards:
    """Which rows an optimizer step runs, in which micro-batches, and what the models say of them.

    Args:
        policy: the student, and whose weights the teachers' may be.
        teachers: `teacher` and `reference`.
        batch: the rollouts and what is known of them.
        rows: those of this optimizer step; the active ones of them are run.
        max_tokens: budget of a micro-batch, in distinct tokens of its larger forward.
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
        self.prompts = {
            "student": batch.student_prompts(),
            "teacher": [ids for group in batch.teacher.ids for ids in group],
            "reference": [ids for group in batch.reference.ids for ids in group],
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
        self.lengths = batch.mask.sum(-1)
        self.temperature = batch.rollouts.temperature
        self.micro_batches = token_budget(
            self.chosen.nonzero()[:, 0].tolist(),
            self.lengths.tolist(),
            list(self.prompts.values()),
            group=batch.rollouts.ids.shape[1],
            max_tokens=max_tokens,
        )
        self._kept: dict[tuple[int, str], TeacherOutput] = {}

    def of_tokens(self, micro: Sequence[int], table: Tensor) -> Tensor:
        """[N]: the entries of `table` [R, L] at the micro-batch's tokens, in row-major order."""
        return table[list(micro)][self.batch.mask[list(micro)]]

    def loss(self, micro: list[int], loss: Callable[[Tensor, nn.Linear], LossOutput]) -> LossOutput:
        """The student's forward with `loss(hidden states [N, D], head)` at its end; a gradient."""
        rows = self._rows(micro, self.prompts["student"])
        self.timer.count("student", rows.distinct_tokens)
        return self.policy(rows, loss)

    def student(self, micro: list[int]) -> LogitsOf:
        """The current policy on a micro-batch, without gradient."""
        rows = self._rows(micro, self.prompts["student"])
        hidden, linear = self.policy.run(self.policy.adapter.current(), rows)
        head = Head.of(linear)
        return lambda part, buffers: TokenLogits.of(hidden[part], head, self.temperature, buffers)

    def keep(self, slot: str, micro: list[int]) -> TeacherOutput:
        """Run a teacher on a micro-batch, and keep what it says until `take`."""
        output = self._kept[micro[0], slot] = self._run(slot, micro)
        return output

    def take(self, slot: str, micro: list[int]) -> TeacherOutput:
        """What the teacher says of a micro-batch; what was kept is not run again."""
        kept = self._kept.pop((micro[0], slot), None)
        return self._run(slot, micro) if kept is None else kept

    def _run(self, slot: str, micro: list[int]) -> TeacherOutput:
        teacher, reads = self.teachers[slot], self.reads[slot]
        some = [row for row, read in zip(micro, reads[micro].tolist(), strict=True) if read]
        if not some:
            return TeacherOutput(hidden=(), heads=(), combine=teacher.combine)
        with self.timer("teacher"):
            rows = self._rows(some, self.prompts[slot])
            self.timer.count("teacher", rows.distinct_tokens)
            runs = [self.policy.run(trunk, rows) for trunk in teacher.trunks(self.policy)]
            # Rows that it does not read keep zeros: uniform logits, and no credit reads them.
            here = self.of_tokens(micro, reads[:, None].expand_as(self.batch.mask))
            return TeacherOutput(
                hidden=tuple(_place(hidden, here) for hidden, _ in runs),
                heads=tuple(Head.of(head) for _, head in runs),
                combine=teacher.combine,
            )

    def _rows(self, micro: Sequence[int], prompts: list[tuple[int, ...]]) -> Rows:
        width = int(self.lengths[list(micro)].max())
        return Rows(
            prompts=[prompts[row] for row in micro],
            ids=self.batch.ids[list(micro), :width],
            mask=self.batch.mask[list(micro), :width],
            pad_id=self.policy.chat.pad_id,
        )


def _place(values: Tensor, here: Tensor) -> Tensor:
    """Rows of `values` at the True places of `here` [N], zeros elsewhere."""
    if bool(here.all()):
        return values
    full = values.new_zeros((len(here), *values.shape[1:]))
    full[here] = values
    return full
