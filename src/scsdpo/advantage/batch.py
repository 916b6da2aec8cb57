"""A judged batch with its plan, weights and contexts, ready for the optimizer steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from scsdpo.advantage._base import Plan
from scsdpo.types import Judged, Moment, TeacherContexts


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """R = Q * G judged responses with plan, weights and contexts. Row q * G + g is rollout (q, g).

    All of it is known before the first forward.
    """

    judged: Judged
    plan: Plan
    weights: Tensor
    """[Q, G] float64 question and rollout weights."""
    contexts: Mapping[str, TeacherContexts]
    """Slot -> teacher prompts. Slots are `teacher`, `reference`, and `teacher/NAME` for the further
    parts of `Contexts`."""
    questions: tuple[int, ...]
    """Number of questions of each optimizer step, which takes them in order."""
    objective_name: str
    """Name of the mean objective in the log."""
    old_logprobs: Tensor
    """[R, L] nats: log-probs under the policy before the batch's first update; nan: unknown."""
    now: Moment = Moment(0, 0)
    """The moment of that policy; set if older weights may have sampled the batch."""

    @classmethod
    def of(
        cls,
        judged: Judged,
        plan: Plan,
        weights: Tensor,
        contexts: Mapping[str, TeacherContexts],
        questions: tuple[int, ...],
        objective_name: str = "objective",
        now: Moment = Moment(0, 0),
    ) -> "Batch":
        """A batch before its first update."""
        unknown = torch.full_like(judged.responses.policy_logprobs, torch.nan, dtype=torch.float64)
        return cls(
            judged=judged,
            plan=plan,
            weights=weights,
            contexts=contexts,
            questions=questions,
            objective_name=objective_name,
            old_logprobs=unknown.flatten(0, 1),
            now=now,
        )

    @property
    def teacher(self) -> TeacherContexts:
        """Prompts of the teacher's first context."""
        return self.contexts["teacher"]

    def reads(self, slot: str) -> Tensor:
        """[R] bool: rollouts whose credit reads the distribution after the slot's context."""
        of = self.plan.needs_reference if slot.startswith("reference") else self.plan.needs_teacher
        if slot in ("teacher", "reference"):
            return of.flatten()
        return (of & self.contexts[slot].available.to(of.device).view_as(of)).flatten()

    @property
    def ids(self) -> Tensor:
        """[R, L] response ids."""
        return self.judged.responses.ids.flatten(0, 1)

    @property
    def present(self) -> Tensor:
        """[R, L] bool: a token stands here."""
        return self.judged.responses.present.flatten(0, 1)

    @property
    def sampled(self) -> Tensor:
        """[R, L] bool: the policy drew this token. Other tokens are attended to, never learned."""
        return self.judged.responses.sampled.flatten(0, 1)

    @property
    def ages(self) -> Tensor:
        """[R, L, 2] int32: how old each token is, as in `Responses.ages`."""
        return self.judged.responses.ages(self.now).flatten(0, 1)

    @property
    def active(self) -> Tensor:
        """[R] bool: rollouts that can get credit; the others enter no forward."""
        wanted = self.plan.active & (self.weights > 0) & (self.judged.lengths > 0)
        return wanted.flatten()

    @property
    def steps(self) -> list[list[int]]:
        """Rows of each optimizer step."""
        ends = list(accumulate(self.questions, initial=0))
        group = self.judged.rewards.shape[1]
        return [list(range(a * group, b * group)) for a, b in pairwise(ends)]

    def student_prompts(self) -> list[tuple[int, ...]]:
        """[R] prompt ids."""
        group = self.judged.rewards.shape[1]
        return [prompt.ids for prompt in self.judged.prompts for _ in range(group)]
