"""Raises the sampled token, the more the teacher prefers it to the student."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scsdpo.advantage._base import Advantage, Plan
from scsdpo.loss import Chunk, Credit, SparseCredit
from scsdpo.types import Judged


@dataclass(frozen=True, kw_only=True)
class GatedGap(Advantage):
    """objective = g D, D = log T(y) - log S(y), g = sigmoid(sharpness D);   c(y) = g, else 0

    g and T are detached, so this is a likelihood objective: every sampled token is raised, with a
    credit near 1 where the teacher gives it much more probability than the student, and near 0
    where it gives much less. It stands beside a policy gradient (`Blend`), with a small weight.
    sharpness = 0 gives g = 1/2 everywhere.

    A rollout without a teacher prompt gets no credit and is not run.

    Args:
        sharpness: per nat, >= 0.

    Shapes:
        credit at the sampled tokens [n, 1]; objective [n] in nats, of either sign.

    Raises:
        ValueError: if `sharpness` < 0.

    Source:
        SDAR, arXiv:2605.15155, and its code: sharpness 5, weight .01; SEED, arXiv:2607.14777.
    """

    sharpness: float = 5.0

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError(f"`GatedGap(sharpness=...)` must be >= 0, got {self.sharpness}")

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def objective_name(self) -> str:
        return "gated_gap"

    def plan(self, judged: Judged, available: Tensor) -> Plan:
        return Plan(active=available, needs_teacher=available, credit=self._credit)

    def _credit(self, chunk: Chunk) -> Credit:
        gap = chunk.teacher().logprob(chunk.ids) - chunk.logprob
        gate = torch.sigmoid(self.sharpness * gap)
        return SparseCredit.at_sampled(chunk, gate, objective=gate * gap)
