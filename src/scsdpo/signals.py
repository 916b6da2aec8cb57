"""Per-token scalars of a whole batch, for strategies that need them before the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Signals:
    """Scalars [R, L] of the R = Q * G rollouts of an optimizer step; 0 where not measured.

    A strategy names the fields that it `needs`; the update fills them in a pass without gradient
    before the loss. A strategy that names none costs nothing.
    """

    student_logprob: Tensor
    """log S(y_t), nats, under the current policy."""
    student_entropy: Tensor
    """H(S_t), nats."""
    teacher_logprob: Tensor
    """log T(y_t), nats."""
    teacher_entropy: Tensor
    """H(T_t), nats."""

    @staticmethod
    def empty(mask: Tensor) -> "Signals":
        """Zeros in the shape of `mask` [R, L]."""
        zeros = [torch.zeros(mask.shape, dtype=torch.float64, device=mask.device) for _ in range(4)]
        return Signals(
            student_logprob=zeros[0],
            student_entropy=zeros[1],
            teacher_logprob=zeros[2],
            teacher_entropy=zeros[3],
        )
