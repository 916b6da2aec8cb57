"""The update: from a batch of judged rollouts to gradients, one optimizer step at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from scsdpo.advantage import Plan
from scsdpo.loss import (
    Buffers,
    Head,
    Importance,
    LossOutput,
    Objective,
    TokenLogits,
    Tokens,
    Voice,
    chunks,
    credit_loss,
)
from scsdpo.policy import CausalLM, Rows, Trunk
from scsdpo.reduction import Reduction
from scsdpo.signals import Signals
from scsdpo.teacher import Teacher
from scsdpo.types import Rollouts, TeacherContexts
from scsdpo.weighting import TokenWeighting


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What is known of R = Q * G rollouts before the first forward. Rows are q * G + g."""

    rollouts: Rollouts
    plan: Plan
    weights: Tensor
    """[Q, G] float64 question and rollout weights."""
    teacher: TeacherContexts
    reference: TeacherContexts
    old_logprobs: Tensor
    """[R, L]: log-probs under the policy before the batch's first update; nan: not measured."""

    @property
    def ids(self) -> Tensor:
        """[R, L] response ids."""
        return self.rollouts.ids.flatten(0, 1)

    @property
    def mask(self) -> Tensor:
        """[R, L] bool response mask."""
        return self.rollouts.mask.flatten(0, 1)

    @property
    def active(self) -> Tensor:
        """[R] bool: rollouts that can get credit; the others enter no forward."""
        wanted = self.plan.active & (self.weights > 0) & (self.rollouts.lengths > 0)
        return wanted.flatten()

    def student_prompts(self) -> list[tuple[int, ...]]:
        """[R] prompt ids."""
        group = self.rollouts.ids.shape[1]
        return [prompt.ids for prompt in self.rollouts.prompts for _ in range(group)]


@dataclass(frozen=True, kw_only=True)
class Update:
    """Turns rows of a batch into losses with a gradient, micro-batch by micro-batch.

    Args:
        teacher: speaks where the plan needs it.
        reference: the same, for the anchor.
        token_weighting: factor on each token.
        reduction: how tokens add up; denominators are those of the whole optimizer step.
        importance: factor on each token from the sampler's log-probs.
        needs: fields of `Signals` that the strategies ask for: a pass without gradient fills them.
    """

    teacher: Teacher
    reference: Teacher
    token_weighting: TokenWeighting
    reduction: Reduction
    importance: Importance
    needs: frozenset[str]

    def losses(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[LossOutput, Tensor]]:
        """Per micro-batch of the active ones among `rows`, its share of the step's loss and the
        sampler's log-probs [N]. The caller runs backward on each before asking for the next.

        Args:
            policy: is run, and gets the gradient.
            batch: the rollouts and what is known of them.
            rows: those of this optimizer step.
            max_tokens: budget of a micro-batch, in distinct tokens of its larger forward. It
                changes memory and speed, and no number.
        """
        step = _Step(self, policy, batch, rows, max_tokens)
        sampled = batch.rollouts.policy_logprobs.flatten(0, 1)
        for micro in step.micro_batches:
            yield step.loss(micro), step.of_tokens(micro, sampled)
            step.student.done(micro)

    def measure(
        self, policy: CausalLM, batch: Batch, rows: Sequence[int], max_tokens: int
    ) -> Tensor:
        """[R, L]: log S(y) of the active ones among `rows`, without gradient; nan elsewhere."""
        measuring = replace(self, needs=frozenset({"student_logprob"}))
        step = _Step(measuring, policy, batch, rows, max_tokens)
        measured = batch.mask & step.chosen[:, None]
        return torch.where(measured, step.signals.student_logprob, torch.nan)


class _Step:
    """One optimizer step: its denominators, signals and scales, made before the first backward."""

    def __init__(
        self,
        update: Update,
        policy: CausalLM,
        batch: Batch,
        rows: Sequence[int],
        max_tokens: int,
    ) -> None:
        self.update, self.policy, self.batch = update, policy, batch
        self.max_tokens = max_tokens
        self.rows = {
            "student": self._rows(batch.student_prompts()),
            "teacher": self._rows([ids for group in batch.teacher.ids for ids in group]),
            "reference": self._rows([ids for group in batch.reference.ids for ids in group]),
        }
        self.reads = {
            "teacher": batch.plan.needs_teacher.flatten(),
            "reference": batch.plan.needs_reference.flatten(),
        }
        active = batch.active
        index = torch.tensor(rows, dtype=torch.long, device=active.device)
        self.chosen = torch.zeros_like(active).index_fill_(0, index, True) & active
        self.lengths = batch.mask.sum(-1)
        self.temperature = batch.rollouts.temperature
        chosen = self.chosen.nonzero()[:, 0].tolist()
        self.student = policy.trunk(self.rows["student"], chosen, max_tokens)
        self.micro_batches = self.student.micro_batches()
        self.trunks = {slot: self._trunks(slot) for slot in self.reads}
        self.kept: dict[tuple[int, str], Voice] = {}
        self.signals = self._measure()
        for make in (*batch.plan.derivations, *update.importance.derivations):
            self.signals.derive(make)
        self.scale = self._scale(index)

    def _scale(self, index: Tensor) -> Tensor:
        """[R, L]: denominator, question weight and token weight of every token."""
        batch, update = self.batch, self.update
        coefficients = torch.zeros_like(batch.weights.flatten())
        coefficients[index] = update.reduction.coefficients(
            self.lengths[index], batch.active[index]
        ).to(coefficients.dtype)
        distilled = batch.mask & (self.reads["teacher"] & self.chosen)[:, None]
        per_token = update.token_weighting.weigh(self.signals, distilled)
        return (coefficients * batch.weights.flatten())[:, None] * per_token

    def _rows(self, prompts: list[tuple[int, ...]]) -> Rows:
        batch = self.batch
        return Rows(prompts=prompts, ids=batch.ids, mask=batch.mask, pad_id=self.policy.chat.pad_id)

    def _trunks(self, slot: str) -> list[Trunk]:
        """Per set of weights of a teacher, the rows that it reads."""
        reading = (self.reads[slot] & self.chosen).nonzero()[:, 0].tolist()
        return [
            self.policy.trunk(self.rows[slot], reading, self.max_tokens, weights)
            for weights in self._teacher(slot).trunks(self.policy)
        ]

    def _teacher(self, slot: str) -> Teacher:
        return self.update.teacher if slot == "teacher" else self.update.reference

    def of_tokens(self, micro: Sequence[int], table: Tensor) -> Tensor:
        """[N]: the entries of `table` [R, L] at the micro-batch's tokens, in row-major order."""
        return table[list(micro)][self.batch.mask[list(micro)]]

    def voice(self, slot: str, micro: list[int]) -> Voice:
        """The teacher or reference on a micro-batch; what was measured is not run again."""
        kept = self.kept.pop((micro[0], slot), None)
        return self._run_voice(slot, micro) if kept is None else kept

    def _run_voice(self, slot: str, micro: list[int]) -> Voice:
        teacher = self._teacher(slot)
        reads = self.reads[slot][micro]
        some = [row for row, wanted in zip(micro, reads.tolist(), strict=True) if wanted]
        if not some:
            return Voice(hidden=(), heads=(), combine=teacher.combine)
        runs = [trunk.run(some, _with_head) for trunk in self.trunks[slot]]
        for trunk in self.trunks[slot]:
            trunk.done(some)
        # Rows without this voice keep zeros: their logits are uniform and no credit reads them.
        here = self.of_tokens(micro, self.reads[slot][:, None].expand_as(self.batch.mask))
        return Voice(
            hidden=tuple(_place(hidden, here) for hidden, _ in runs),
            heads=tuple(head for _, head in runs),
            combine=teacher.combine,
        )

    def loss(self, micro: list[int]) -> LossOutput:
        """The micro-batch's share of the step's loss."""
        mask = self.batch.mask
        places = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        tokens = Tokens(
            ids=self.of_tokens(micro, self.batch.ids),
            places=self.of_tokens(micro, places),
            scale=self.of_tokens(micro, self.scale),
            signals=self.signals,
        )
        objective = Objective(
            credit=self.batch.plan.credit,
            importance=self.update.importance.weigh,
            teacher=self.voice("teacher", micro),
            reference=self.voice("reference", micro),
            temperature=self.temperature,
        )
        loss = partial(credit_loss, tokens=tokens, objective=objective)
        return self.student.run(micro, loss)

    @torch.no_grad()
    def _measure(self) -> Signals:
        """The signals that strategies need, of every chosen row; zeros elsewhere."""
        sampled = self.batch.rollouts.sampling_logprobs.flatten(0, 1)
        signals = Signals.unmeasured(self.batch.mask, sampled, self.batch.old_logprobs)
        measures_student = any(name.startswith("student") for name in self.update.needs)
        measures_teacher = any(name.startswith("teacher") for name in self.update.needs)
        current = self.policy.adapter.current()
        chosen = self.chosen.nonzero()[:, 0].tolist()
        trunk = self.policy.trunk(self.rows["student"], chosen, self.max_tokens, current)
        for micro in self.micro_batches if self.update.needs else []:
            student = cache(partial(self._run_student, trunk, micro))
            if measures_student:
                tables = signals.student_logprob, signals.student_entropy
                self._read(micro, student(), tables)
            if measures_teacher:
                voice = self.kept[micro[0], "teacher"] = self._run_voice("teacher", micro)
                tables = signals.teacher_logprob, signals.teacher_entropy
                if voice.hidden:
                    self._read(micro, partial(self._say, voice, student), tables)
            trunk.done(micro)
        return signals

    def _run_student(
        self, trunk: Trunk, micro: list[int]
    ) -> Callable[[slice, Buffers], TokenLogits]:
        """The current policy on a micro-batch, without gradient: slice of tokens -> logits."""
        hidden, head = trunk.run(micro, _with_head)
        return lambda part, buffers: TokenLogits.of(hidden[part], head, self.temperature, buffers)

    def _say(
        self,
        voice: Voice,
        student: Callable[[], Callable[[slice, Buffers], TokenLogits]],
        part: slice,
        buffers: Buffers,
    ) -> TokenLogits:
        tables = voice.tables(part, self.temperature, buffers)
        trunks = tuple(TokenLogits(table, buffers) for table in tables)
        return voice.combine(lambda: student()(part, buffers), trunks)

    def _read(
        self,
        micro: list[int],
        logits: Callable[[slice, Buffers], TokenLogits],
        tables: tuple[Tensor, Tensor],
    ) -> None:
        """Write log-prob and entropy of a micro-batch's tokens into two tables [R, L]."""
        ids = self.of_tokens(micro, self.batch.ids)
        values = ids.new_zeros((2, len(ids)), dtype=torch.float64)
        buffers = Buffers()
        for part in chunks(len(ids), self.policy.vocabulary, ids.device):
            buffers.recycle()
            here = logits(part, buffers)
            values[0, part], values[1, part] = here.logprob(ids[part]), here.entropy()
        mask = torch.zeros_like(self.batch.mask)
        mask[micro] = self.batch.mask[micro]
        for table, row in zip(tables, values, strict=True):
            table[mask] = row  # both in row-major order: a micro-batch's rows ascend


def _with_head(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Head]:
    return hidden, Head.of(head)


def _place(values: Tensor, here: Tensor) -> Tensor:
    """Rows of `values` at the True places of `here` [N], zeros elsewhere."""
    if bool(here.all()):
        return values
    full = values.new_zeros((len(here), *values.shape[1:]))
    full[here] = values
    return full
