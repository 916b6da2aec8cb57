"""The pass without gradient that fills the tables which strategies ask for."""

from collections.abc import Callable, Set
from functools import cache, partial

import torch
from torch import Tensor

from scsdpo.loss import Buffers, Signals, TeacherOutput, TokenLogits, chunks
from scsdpo.training.forwards import Forwards, LogitsOf


@torch.no_grad()
def measure(forwards: Forwards, needs: Set[str]) -> Signals:
    """The signals of every row of a step.

    Args:
        forwards: of the step. A teacher that was measured is kept there, and not run again.
        needs: fields of `Signals` to fill; the others, and rows that do not run, keep zeros.
    """
    batch = forwards.batch
    sampled = batch.rollouts.sampling_logprobs.flatten(0, 1)
    signals = Signals.unmeasured(batch.mask, sampled, batch.old_logprobs)
    of_student = any(name.startswith("student") for name in needs)
    of_teacher = any(name.startswith("teacher") for name in needs)
    for micro in forwards.micro_batches if needs else []:
        student = cache(partial(forwards.student, micro))
        if of_teacher and forwards.in_step("teacher"):
            student()
        if of_student:
            tables = signals.student_logprob, signals.student_entropy
            _read(forwards, micro, student(), tables)
        if of_teacher:
            output = forwards.keep("teacher", micro)
            tables = signals.teacher_logprob, signals.teacher_entropy
            if output.hidden:
                target = partial(_target, output, student, forwards.temperature)
                _read(forwards, micro, target, tables)
    return signals


def _target(
    output: TeacherOutput,
    student: Callable[[], LogitsOf],
    temperature: float,
    part: slice,
    buffers: Buffers,
) -> TokenLogits:
    tables = output.logits(part, temperature, buffers)
    trunks = tuple(TokenLogits(table, buffers) for table in tables)
    return output.combine(lambda: student()(part, buffers), trunks)


def _read(
    forwards: Forwards, micro: list[int], logits: LogitsOf, tables: tuple[Tensor, Tensor]
) -> None:
    """Write log-prob and entropy of a micro-batch's tokens into two tables [R, L]."""
    ids = forwards.of_tokens(micro, forwards.batch.ids)
    values = ids.new_zeros((2, len(ids)), dtype=torch.float64)
    buffers = Buffers()
    for part in chunks(len(ids), forwards.policy.vocabulary, ids.device):
        buffers.recycle()
        here = logits(part, buffers)
        values[0, part], values[1, part] = here.logprob(ids[part]), here.entropy()
    mask = torch.zeros_like(forwards.batch.mask)
    mask[micro] = forwards.batch.mask[micro]
    for table, row in zip(tables, values, strict=True):
        table[mask] = row  # both in row-major order: a micro-batch's rows ascend
