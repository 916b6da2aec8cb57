"""Per-token scalars of a whole optimizer step, for strategies that look beyond a chunk."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scsdpo.contracts import declared


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Signals:
    """Tables [R, L] float64 of the R = Q * G rollouts of an optimizer step, in nats.

    The first four are always there. A strategy names those of the others that it `needs`; the
    update fills them in a pass without gradient before the loss, with 0 where nothing was measured.
    A strategy that names none costs nothing.
    """

    mask: Tensor
    """[R, L] bool: tokens that the policy sampled. All other tables are of these."""
    ended: Tensor
    """[R] bool: the response ended by itself, not by the length cap."""
    sampling_logprob: Tensor
    """log-prob of y_t under the distribution that it was drawn from."""
    old_logprob: Tensor
    """log S(y_t) before the batch's first update; nan: this is the first, old and current agree."""
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
    """The advantage's at the token under the current policy: its loss before any weight. Only of an
    advantage that needs no table itself."""
    _derived: "dict[Derivation, Tensor]" = field(default_factory=dict)

    @staticmethod
    def unmeasured(
        mask: Tensor,
        ended: Tensor,
        sampling_logprob: Tensor,
        old_logprob: Tensor,
        others: int = 0,
    ) -> "Signals":
        """What is known before any forward; zeros (nan for `others`) where a pass would write."""
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
        """`make(self)` [R, L], made once: a return-to-go, a softmax over the group, a mean ratio.

        What a strategy or a plan lists as its `derivations` is made on every rank before the first
        backward, and may therefore sum over ranks.
        """
        if make not in self._derived:
            self._derived[make] = make(self)
        return self._derived[make]


Derivation = Callable[[Signals], Tensor]
"""From measured tables to a table [R, L] of one's own. Compared by identity: name a function, or a
method of a frozen dataclass."""


class NeedsSignals:
    """Mixin: a strategy that may look beyond a chunk."""

    @declared
    def needs(self) -> frozenset[str]:
        """Fields of `Signals` that a measuring pass must fill; none: no pass, no cost."""
        return frozenset()

    @declared
    def derivations(self) -> tuple[Derivation, ...]:
        """Tables made from them before the first backward, on every rank: they may sum over ranks.

        Read with `chunk.derived`.
        """
        return ()


def mean_log_ratio(signals: Signals) -> Tensor:
    """The mean over a rollout's tokens of log S - log S_old, at each of them; 0 in a first update.

    Needs `student_logprob`.
    """
    old = signals.old_logprob
    known = signals.mask & ~old.isnan()
    difference = torch.where(known, signals.student_logprob - old, 0.0)
    mean = difference.sum(-1) / signals.mask.sum(-1).clamp(min=1)
    return mean[:, None].expand_as(signals.mask)


def sampler_log_ratio(signals: Signals) -> Tensor:
    """The sum over a rollout's tokens of log S_old - log S_rollout, at each of them.

    Needs `student_logprob`, which stands for S_old in a first update.
    """
    old = torch.where(signals.old_logprob.isnan(), signals.student_logprob, signals.old_logprob)
    difference = torch.where(signals.mask, old - signals.sampling_logprob, 0.0)
    return difference.sum(-1)[:, None].expand_as(signals.mask)
