"""Record the kernel's values for the tokens of chosen rollouts during the step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scsdpo.loss import ObservedBlock, TokenLogits

_ROWS = 64
"""Number of tokens processed together; their tables [n, V] are float64."""
_COLUMNS = (
    "credit",
    "magnitude",
    "objective",
    "scale",
    "token_weight",
    "importance",
    "logprob",
    "old_logprob",
    "teacher_logprob",
    "entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "jsd",
)
_CANDIDATES = ("top_probs", "top_teacher_probs", "top_credit")


class TokenTrace:
    """An observer of the kernel that keeps columns of values for some rollouts' tokens.

    Values of a repeated block, after memory ran out, replace the old ones. Columns are float64, and
    nan where nothing was computed: `scale` is question weight / denominator, `old_logprob` is
    log S(y) before the batch's first update; the others are those of `TokenRecord`.

    Args:
        rows: flat indices q * G + g of the rollouts.
        taught: [R] bool, True for rollouts whose loss reads the teacher.
        length: L of the step's tables [R, L].
        candidates: number of the most likely tokens to keep of student and teacher each.
    """

    def __init__(
        self, rows: Sequence[int], taught: Tensor, *, length: int, candidates: int
    ) -> None:
        self.rows, self._candidates, self._length = list(rows), candidates, length
        self._taught = taught.cpu()
        self._slot = torch.full((len(taught),), -1)
        self._slot[self.rows] = torch.arange(len(self.rows))
        places = len(self.rows) * length
        self._columns = {n: torch.full((places,), torch.nan).double() for n in _COLUMNS}
        self._ids = torch.full((places, 2 * candidates), -1)
        self._tops = {n: torch.full(self._ids.shape, torch.nan).double() for n in _CANDIDATES}

    def __call__(self, seen: ObservedBlock) -> None:
        slot = self._slot[seen.chunk.rollout.cpu()]
        for part in (slot >= 0).nonzero()[:, 0].split(_ROWS):
            time = seen.chunk.places.cpu()[part] % self._length
            self._write(seen, part, slot[part] * self._length + time)

    def columns(self, row: int, sampled: Tensor) -> dict[str, Tensor]:
        """The columns [n] at a rollout's n sampled tokens; `top_*` are [n, 2 candidates], where an
        id of -1 means none.

        Args:
            row: flat index of the rollout.
            sampled: [L] bool, True for tokens that the policy drew.
        """
        start = int(self._slot[row]) * self._length
        at = start + sampled.cpu().nonzero()[:, 0]
        tables = self._columns | {"top_ids": self._ids} | self._tops
        return {name: table[at] for name, table in tables.items()}

    def _write(self, seen: ObservedBlock, part: Tensor, at: Tensor) -> None:
        """Store the values of the tokens `part` of a block at the positions `at`."""
        chunk, here = seen.chunk, part.to(seen.gradient.device)
        student = TokenLogits(chunk.student.logits[here].double())
        ids, credit = chunk.ids[here], seen.gradient[here].double() * -seen.temperature
        old = chunk.at(chunk.signals.old_logprob)[here]
        values = {
            "credit": credit.gather(-1, ids[:, None])[:, 0],
            "magnitude": credit.abs().sum(-1),
            "objective": seen.objective[here],
            "scale": seen.scale[here],
            "token_weight": seen.token_weight[here],
            "importance": seen.importance[here],
            "logprob": chunk.logprob[here],
            "old_logprob": torch.where(old.isnan(), chunk.logprob[here], old),
            "entropy": seen.entropy[here],
        }
        for name, value in values.items():
            self._columns[name][at] = value.double().cpu()
        taught = self._taught[chunk.rollout.cpu()[part]]
        told = _teacher(seen, here[taught.to(here.device)])
        self._compare(student, told, ids, at, taught)
        self._keep_candidates(student, told, credit, at, taught)

    def _compare(
        self, student: TokenLogits, teacher: TokenLogits, ids: Tensor, at: Tensor, taught: Tensor
    ) -> None:
        where, here = at[taught], taught.to(ids.device)
        log_s, log_t = student.log_probs[here], teacher.log_probs
        values = {
            "teacher_logprob": teacher.logprob(ids[here]),
            "teacher_entropy": teacher.entropy(),
            "forward_kl": _kl(log_t, log_s),
            "reverse_kl": _kl(log_s, log_t),
        }
        middle = torch.logaddexp(log_s, log_t) - torch.log(log_s.new_tensor(2.0))
        values["jsd"] = (_kl(log_s, middle) + _kl(log_t, middle)) / 2
        for name, value in values.items():
            self._columns[name][where] = value.cpu()

    def _keep_candidates(
        self,
        student: TokenLogits,
        teacher: TokenLogits,
        credit: Tensor,
        at: Tensor,
        taught: Tensor,
    ) -> None:
        k = min(self._candidates, student.logits.shape[-1])
        here = taught.to(credit.device)
        own = student.logits.topk(k, dim=-1).indices
        other = torch.full_like(own, -1)
        other[here] = teacher.logits.topk(k, dim=-1).indices
        known = (other[:, :, None] == own[:, None]).any(-1)
        ids = torch.cat([own, other.masked_fill(known, -1)], dim=1)
        asked = ids.clamp(min=0)
        told = torch.full_like(credit, torch.nan)
        told[here] = teacher.probs
        tables = {"top_probs": student.probs, "top_teacher_probs": told, "top_credit": credit}
        columns = slice(0, 2 * k)
        self._ids[at, columns] = ids.cpu()
        for name, table in tables.items():
            value = table.gather(-1, asked).masked_fill(ids < 0, torch.nan)
            self._tops[name][at, columns] = value.cpu()


def _teacher(seen: ObservedBlock, here: Tensor) -> TokenLogits:
    """The teacher's distributions at `here`."""
    if not len(here):
        return TokenLogits(seen.gradient.new_zeros(seen.gradient[:0].shape).double())
    return TokenLogits(seen.chunk.teacher().logits[here].double())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL [n] = sum_v p log(p / q), where tokens with p = 0 contribute 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
