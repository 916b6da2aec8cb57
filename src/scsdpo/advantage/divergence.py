"""Divergences between student and target on a common support, as centred credit."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class FDivergence(ABC):
    """A divergence of the student S from the target T: >= 0, and 0 iff S = T; finite supports."""

    @abstractmethod
    def credit(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """Credit [n, B], centred, and value [n] of the divergence at n positions.

        Args:
            log_s: [n, B] the student's log-probs; their exponentials sum to 1; -inf is allowed.
            log_t: [n, B] the target's log-probs, of the same entries.
        """


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Divergence(FDivergence):
    """Forward KL, reverse KL or skewed JSD, in nats.

        alpha = 0   forward KL   sum_v T log(T / S)                        A = T / S
        alpha = 1   reverse KL   sum_v S log(S / T)                        A = log T - log S
        else        skewed JSD   (1 - a) sum_v S log(S / M) + a sum_v T log(T / M)
                                 with M = (1 - a) S + a T                  A = (1 - a) log(M / S)

    In each case c(v) = S(v) (A(v) - sum_u S(u) A(u)), which is minus the gradient w.r.t. log S.
    Note the sign: d JSD / d S(v) = (1 - a) log(S / M) is the descent coefficient; as an advantage
    it is (1 - a) log(M / S). The skewed form vanishes as a -> 0 or 1, so the two ends are separate
    cases. Entries with S = 0 get no credit. The value is >= 0, and 0 iff S = T.

    With `summand_clip` every summand f_v is clipped from above: sum_v min(f_v, clip), which may be
    negative. A clipped summand gives no credit. The others give minus the derivative w.r.t.
    log S(v), which is T, -S (log(S/T) + 1) or (1 - a) S log(M/S). Then c is centred.

    Args:
        alpha: a in [0, 1]: 0 forward KL, 1 reverse KL, 0.5 the JSD of the paper.
        summand_clip: largest summand of the sum over the vocabulary, > 0. inf: no clipping.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        arXiv:2601.20802 and its code; OPSD, arXiv:2601.18734, for the clip.
    """

    alpha: float = 0.5
    summand_clip: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                "`Divergence(alpha=...)` must be in [0, 1] (0 forward KL, 1 reverse KL, between "
                f"them skewed JSD), got {self.alpha}"
            )
        if not self.summand_clip > 0:
            raise ValueError(
                "`Divergence(summand_clip=...)` must be > 0 (.inf: no clipping), "
                f"got {self.summand_clip}"
            )

    def credit(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        s, t = log_s.exp(), log_t.exp()
        if self.summand_clip == math.inf:
            return self._centred(s, t, log_s, log_t)
        return self._clipped(s, t, log_s, log_t)

    def _log_mixture(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """Log M."""
        return torch.logaddexp(log_s + math.log1p(-self.alpha), log_t + math.log(self.alpha))

    def _centred(self, s: Tensor, t: Tensor, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha
        if alpha == 0:
            return t - s, _expect(t, log_t - log_s).sum(-1)
        if alpha == 1:
            weighted = _expect(s, log_t - log_s)
        else:
            log_m = self._log_mixture(log_s, log_t)
            weighted = _expect(s, log_m - log_s) * (1 - alpha)
        mean = weighted.sum(-1, keepdim=True)
        value = -mean[:, 0]
        if alpha != 1:
            value = value + alpha * _expect(t, log_t - log_m).sum(-1)
        return weighted - s * mean, value

    def _clipped(self, s: Tensor, t: Tensor, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha
        if alpha == 0:
            summands, values = _expect(t, log_t - log_s), t
        elif alpha == 1:
            summands = _expect(s, log_s - log_t)
            values = -(summands + s)
        else:
            log_m = self._log_mixture(log_s, log_t)
            own = (1 - alpha) * _expect(s, log_s - log_m)
            summands, values = own + alpha * _expect(t, log_t - log_m), -own
        values = torch.where(summands < self.summand_clip, values, 0.0)
        # Centring is the gradient of S's normalisation, on a truncated support too.
        centred = values - s * values.sum(-1, keepdim=True)
        return centred, summands.clamp(max=self.summand_clip).sum(-1)


@dataclass(frozen=True)
class SquaredHellinger(FDivergence):
    """H^2 = 1/2 sum_v (sqrt S - sqrt T)^2 = 1 - b, b = sum_v sqrt(S T).   A = 1/2 sqrt(T / S)

    It is in [0, 1]. c(v) = 1/2 (sqrt(S T) - S b): as S(v) -> 0 the credit falls as sqrt S, where
    that of the forward KL stays at T.

    Source:
        GeoSD, arXiv:2607.06855.
    """

    def credit(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        return _overlap_credit(log_s, log_t) / 2, _hellinger(log_s, log_t)


@dataclass(frozen=True)
class SquaredFisherRao(FDivergence):
    """d^2 = 4 arccos(b)^2, b = sum_v sqrt(S T): squared length of the geodesic between S and T.

    It is in [0, pi^2], and near S = T it is 8 H^2. c(v) = 4 phi / sin(phi) (sqrt(S T) - S b),
    phi = arccos b. As a `ReferenceAnchor` to a `Restart` it limits the drift from the last copy.

    Source:
        GeoSD, arXiv:2607.06855.
    """

    def credit(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        # From 1 - cos(phi) = 2 sin(phi / 2)^2; arccos itself is inexact near 1.
        phi = 2 * (_hellinger(log_s, log_t).clamp(max=1) / 2).sqrt().asin()
        stretch = 4 / torch.sinc(phi / math.pi)
        return stretch[:, None] * _overlap_credit(log_s, log_t), 4 * phi.square()


def _hellinger(log_s: Tensor, log_t: Tensor) -> Tensor:
    """[n]: H^2."""
    return ((log_s / 2).exp() - (log_t / 2).exp()).square().sum(-1) / 2


def _overlap_credit(log_s: Tensor, log_t: Tensor) -> Tensor:
    """[n, B]: sqrt(S T) - S sum sqrt(S T), twice d b / d log S."""
    roots = ((log_s + log_t) / 2).exp()
    return roots - log_s.exp() * roots.sum(-1, keepdim=True)


def _expect(p: Tensor, x: Tensor) -> Tensor:
    """P * x, and 0 where p = 0, though x may be infinite there."""
    return torch.where(p > 0, p * x, 0.0)
