"""A batch of judged rollouts, ready to be learned from."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from scsdpo.advantage import Plan
from scsdpo.types import JudgedBatch, Lesson, Outcomes, Rollouts, TeacherContexts


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What is known of R = Q * G rollouts before the first forward. Rows are q * G + g."""

    rollouts: Rollouts
    outcomes: Outcomes
    plan: Plan
    weights: Tensor
    """[Q, G] float64 question and rollout weights."""
    teacher: TeacherContexts
    reference: TeacherContexts
    questions: tuple[int, ...]
    """Of each optimizer step, how many; the first ones first."""
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

    @property
    def steps(self) -> list[list[int]]:
        """Rows of each optimizer step."""
        ends = list(accumulate(self.questions, initial=0))
        group = self.rollouts.ids.shape[1]
        return [list(range(a * group, b * group)) for a, b in pairwise(ends)]

    def student_prompts(self) -> list[tuple[int, ...]]:
        """[R] prompt ids."""
        group = self.rollouts.ids.shape[1]
        return [prompt.ids for prompt in self.rollouts.prompts for _ in range(group)]

    def judged(self, objective_name: str) -> JudgedBatch:
        """What callbacks are shown of it."""
        return JudgedBatch(
            split="train",
            rollouts=self.rollouts,
            outcomes=self.outcomes,
            weights=self.weights,
            lesson=Lesson(
                active=self.active.view_as(self.outcomes.successes),
                reads_teacher=self.plan.needs_teacher,
                teacher=self.teacher,
                objective_name=objective_name,
            ),
        )
