"""Tables of per-token scalars of a whole optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scsdpo.contracts import declared


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Signals:
    """Tables [R, L] float64 of the R = Q * G rollouts of an optimizer step, in nats.

    The first four are always known. A strategy names those of the others that it `needs`, and the
    update measures them in a pass without gradient before the loss. Entries that are not measured
    are 0. If no strategy names one, there is no such pass.
    """

    mask: Tensor
    """[R, L] bool: tokens that the policy sampled. All other tables are of these tokens."""
    ended: Tensor
    """[R] bool: the response ended by itself, not by the length cap."""
    sampling_logprob: Tensor
    """log-prob of y_t under the distribution that it was drawn from."""
    old_logprob: Tensor
    """log S(y_t) before the batch's first update; nan in the first update, where S is that."""
    student_logprob: Tensor
    """log S(y_t) under the current policy."""
    student_entropy: Tensor
    """H(S_t)."""
    teacher_logprob: Tensor
    """log T(y_t)."""
    teacher_entropy: Tensor
    """H(T_t)."""
    teacher_kl: Tensor
    """KL(T_t || S_t), over the whole vocabulary."""
    others: Tensor
    """[P, R, L]: log-prob of y_t under the teacher's weights after each of its P further contexts
    (`Contexts`); nan where the rollout does not have the context."""
    objective: Tensor
    """The advantage's objective at each token under the current policy, without any weight. It can
    be measured only if the advantage needs no table itself."""
    _derived: "dict[Derivation, Tensor]" = field(default_factory=dict)

    @staticmethod
    def unmeasured(
        mask: Tensor,
        ended: Tensor,
        sampling_logprob: Tensor,
        old_logprob: Tensor,
        others: int = 0,
    ) -> "Signals":
        """Signals before any forward: unknown tables are 0 (nan in `others`)."""
        zeros = [torch.zeros(mask.shape, dtype=torch.float64, device=mask.device) for _ in range(6)]
        return Signals(
            mask=mask,
            ended=ended,
            sampling_logprob=sampling_logprob.double(),
            old_logprob=old_logprob.double(),
            student_logprob=zeros[0],
            student_entropy=zeros[1],
            teacher_logprob=zeros[2],
            teacher_entropy=zeros[3],
            teacher_kl=zeros[4],
            others=torch.full_like(zeros[3], torch.nan).expand(others, *mask.shape).clone(),
            objective=zeros[5],
        )

    def derive(self, make: "Derivation") -> Tensor:
        """`make(self)` [R, L], computed once: e.g. a return-to-go, a softmax over the group.

        Functions that a strategy or plan lists as its `derivations` are called on every rank before
        the first backward, so that they may sum over ranks.
        """
        if make not in self._derived:
            self._derived[make] = make(self)
        return self._derived[make]


Derivation = Callable[[Signals], Tensor]
"""A function from measured tables to a table [R, L]. It is a dictionary key: use a function, or a
method of a frozen dataclass."""


class NeedsSignals:
    """Mixin for strategies that read tables of the whole optimizer step."""

    @declared
    def needs(self) -> frozenset[str]:
        """Fields of `Signals` that must be measured before the loss."""
        return frozenset()

    @declared
    def derivations(self) -> tuple[Derivation, ...]:
        """Functions of `Signals`, whose tables the strategy reads with `chunk.derived`.

        They are called on every rank before the first backward, and may sum over ranks.
        """
        return ()


def mean_log_ratio(signals: Signals) -> Tensor:
    """[R, L]: the mean over a rollout's tokens of log S - log S_old; 0 in a first update.

    It needs `student_logprob`.
    """
    old = signals.old_logprob
    known = signals.mask & ~old.isnan()
    difference = torch.where(known, signals.student_logprob - old, 0.0)
    mean = difference.sum(-1) / signals.mask.sum(-1).clamp(min=1)
    return mean[:, None].expand_as(signals.mask)


def sampler_log_ratio(signals: Signals) -> Tensor:
    """[R, L]: the sum over a rollout's tokens of log S_old - log S_rollout.

    It needs `student_logprob`, which is log S_old in a first update.
    """
    old = torch.where(signals.old_logprob.isnan(), signals.student_logprob, signals.old_logprob)
    difference = torch.where(signals.mask, old - signals.sampling_logprob, 0.0)
    return difference.sum(-1)[:, None].expand_as(signals.mask)
