"""The pass without gradient that fills the tables which strategies ask for."""

from collections.abc import Callable, Mapping, Set
from functools import cache, partial

import torch
from torch import Tensor

from scsdpo.errors import ConfigurationError
from scsdpo.loss import Buffers, Chunk, Signals, TeacherOutput, TokenLogits, chunks
from scsdpo.training.forwards import Forwards, LogitsOf

OBJECTIVE_OF_TABLES = (
    "the objective is measured before the loss, and cannot itself depend on measured tables: "
    "choose an advantage that reads none, or other token weights"
)


@torch.no_grad()
def measure(forwards: Forwards, needs: Set[str]) -> Signals:
    """The signals of every row of a step.

    Args:
        forwards: of the step. A teacher that was measured is kept there, and not run again.
        needs: fields of `Signals` to fill; the others, and rows that do not run, keep zeros.

    Raises:
        ConfigurationError: if the objective is asked for, and depends on tables itself.
    """
    batch = forwards.batch
    sampled = batch.judged.responses.sampling_logprobs.flatten(0, 1)
    ended = batch.judged.ended.flatten()
    further = forwards.others
    signals = Signals.unmeasured(batch.sampled, ended, sampled, batch.old_logprobs, len(further))
    of_student = any(name.startswith("student") for name in needs)
    of_teacher = any(name.startswith("teacher") for name in needs)
    of_objective = "objective" in needs
    if of_objective and batch.plan.derivations:
        raise ConfigurationError(OBJECTIVE_OF_TABLES)
    slots = {
        "teacher": of_teacher or of_objective,
        "reference": of_objective,
        **dict.fromkeys(further, "others" in needs or of_objective),
    }
    for micro in forwards.micro_batches if needs else []:
        student = cache(partial(forwards.student, micro))
        if of_objective or (of_teacher and forwards.in_step("teacher")):
            student()
        if of_student:
            tables = signals.student_logprob, signals.student_entropy
            _read(forwards, micro, student(), tables)
        outputs = {slot: forwards.keep(slot, micro) for slot, asked in slots.items() if asked}
        if of_teacher and outputs["teacher"].hidden:
            tables = signals.teacher_logprob, signals.teacher_entropy
            target = partial(_taught, outputs["teacher"], student, forwards.temperature)
            _read(forwards, micro, target, tables)
        for table, slot in zip(signals.others, further, strict=True):
            if "others" in needs and outputs[slot].hidden:
                target = partial(_taught, outputs[slot], student, forwards.temperature)
                told = torch.zeros_like(table)
                _read(forwards, micro, target, (told, torch.zeros_like(table)))
                here = torch.zeros_like(batch.sampled)
                here[micro] = batch.sampled[micro] & forwards.reads[slot][micro][:, None]
                table[here] = told[here]
        if of_objective:
            _foresee(forwards, micro, student(), outputs, signals)
    return signals


def _taught(
    output: TeacherOutput,
    student: Callable[[], LogitsOf],
    temperature: float,
    part: slice,
    buffers: Buffers,
) -> TokenLogits:
    return _target(output, lambda: student()(part, buffers), temperature, part, buffers)


def _target(
    output: TeacherOutput,
    student: Callable[[], TokenLogits],
    temperature: float,
    part: slice,
    buffers: Buffers,
) -> TokenLogits:
    tables = output.logits(part, temperature, buffers)
    trunks = tuple(TokenLogits(table, buffers) for table in tables)
    return output.combine(student, trunks)


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
    for table, row in zip(tables, values, strict=True):
        _write(forwards, micro, table, row)


def _write(forwards: Forwards, micro: list[int], table: Tensor, values: Tensor) -> None:
    """Put a micro-batch's values [N] into a table [R, L]."""
    mask = torch.zeros_like(forwards.batch.sampled)
    mask[micro] = forwards.batch.sampled[micro]
    table[mask] = values  # both in row-major order: a micro-batch's rows ascend


def _foresee(
    forwards: Forwards,
    micro: list[int],
    student: LogitsOf,
    outputs: Mapping[str, TeacherOutput],
    signals: Signals,
) -> None:
    """Write what the plan's credit says of a micro-batch's tokens."""
    everywhere = torch.arange(signals.mask.numel(), device=signals.mask.device)
    ids = forwards.of_tokens(micro, forwards.batch.ids)
    places = forwards.of_tokens(micro, everywhere.view_as(signals.mask))
    values, buffers = torch.zeros_like(ids, dtype=torch.float64), Buffers()

    def seen(part: slice) -> Chunk:
        made = student(part, buffers)

        def of(slot: str) -> Callable[[], TokenLogits]:
            trunks = outputs[slot]
            return cache(
                partial(_target, trunks, lambda: made, forwards.temperature, part, buffers)
            )

        return Chunk(
            student=made,
            teacher=of("teacher"),
            reference=of("reference"),
            others=tuple(of(slot) for slot in forwards.others),
            ids=ids[part],
            logprob=made.logprob(ids[part]),
            places=places[part],
            signals=signals,
        )

    for part in chunks(len(ids), forwards.policy.vocabulary, ids.device):
        buffers.recycle()
        values[part] = forwards.batch.plan.credit(seen(part)).objective.double()
    _write(forwards, micro, signals.objective, values)
