"""A judged batch, ready to be learned from."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from scsdpo.advantage._base import Plan
from scsdpo.types import Judged, Moment, TeacherContexts


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What is known of R = Q * G judged responses before the first forward. Rows are q * G + g."""

    judged: Judged
    plan: Plan
    weights: Tensor
    """[Q, G] float64 question and rollout weights."""
    contexts: Mapping[str, TeacherContexts]
    """By slot, what is read before each response: `teacher`, `reference`, and where a context has
    further parts (`Contexts`) `teacher/NAME`."""
    questions: tuple[int, ...]
    """Of each optimizer step, how many; the first ones first."""
    objective_name: str
    """What the advantage calls its objective."""
    old_logprobs: Tensor
    """[R, L]: log-probs under the policy before the batch's first update; nan: not measured."""
    now: Moment = Moment(0, 0)
    """When that policy's weights were the newest; told by batches that may be of older weights."""

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
        """What the teacher reads before each response, the first of its contexts."""
        return self.contexts["teacher"]

    def reads(self, slot: str) -> Tensor:
        """[R] bool: rollouts whose credit reads what is said after the slot's context."""
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
        """[R, L] bool: the policy drew this token; the others are read and never learned from."""
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
