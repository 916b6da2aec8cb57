"""Divergences between student and target on a common support, as centred credit."""

import math

import torch
from torch import Tensor


def centred_credit(alpha: float, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Credit and value of the divergence between S and T.

        alpha = 0   forward KL   sum_v T log(T / S)                        A = T / S
        alpha = 1   reverse KL   sum_v S log(S / T)                        A = log T - log S
        else        skewed JSD   (1 - a) sum_v S log(S / M) + a sum_v T log(T / M)
                                 with M = (1 - a) S + a T                  A = (1 - a) log(M / S)

    and in each case c(v) = S(v) (A(v) - sum_u S(u) A(u)), which is minus the gradient w.r.t.
    log S. Note the sign: d JSD / d S(v) = (1 - a) log(S / M) is the descent coefficient; as an
    advantage it is (1 - a) log(M / S). The skewed form vanishes as a -> 0 or 1, so the two ends
    are cases of their own. Entries with S = 0 get no credit; nats; objective >= 0, 0 iff S = T.

    Args:
        alpha: in [0, 1].
        log_s: [n, B] log-probs that sum to one in the exponent; -inf allowed.
        log_t: [n, B] of the target, on the same places.

    Returns:
        values [n, B] and objective [n].

    Source:
        arXiv:2601.20802 and its code; METHODS in docs/methods.md.
    """
    s, t = log_s.exp(), log_t.exp()
    if alpha == 0:
        return t - s, _expect(t, log_t - log_s).sum(-1)
    if alpha == 1:
        weighted = _expect(s, log_t - log_s)
    else:
        log_m = torch.logaddexp(log_s + math.log1p(-alpha), log_t + math.log(alpha))
        weighted = _expect(s, log_m - log_s) * (1 - alpha)
    mean = weighted.sum(-1, keepdim=True)
    objective = -mean[:, 0]
    if alpha != 1:
        objective = objective + alpha * _expect(t, log_t - log_m).sum(-1)
    return weighted - s * mean, objective


def clipped_credit(
    alpha: float, log_s: Tensor, log_t: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The same divergences with every summand clipped from above. objective = sum_v min(f_v, clip)

    f_v is the summand of token v: T log(T/S), S log(S/T), or (1 - a) S log(S/M) + a T log(T/M). A
    clipped one gives no credit, the others T, -S (log(S/T) + 1) or (1 - a) S log(M/S), minus the
    derivative w.r.t. log S(v); then c is centred. Summands, and so the objective, may be negative.

    Args:
        alpha: in [0, 1].
        log_s: [n, B] log-probs.
        log_t: [n, B] of the target, on the same places.
        clip: largest summand, nats.

    Returns:
        values [n, B] and objective [n].
    """
    s, t = log_s.exp(), log_t.exp()
    if alpha == 0:
        summands, values = _expect(t, log_t - log_s), t
    elif alpha == 1:
        summands = _expect(s, log_s - log_t)
        values = -(summands + s)
    else:
        log_m = torch.logaddexp(log_s + math.log1p(-alpha), log_t + math.log(alpha))
        own = (1 - alpha) * _expect(s, log_s - log_m)
        summands, values = own + alpha * _expect(t, log_t - log_m), -own
    values = torch.where(summands < clip, values, 0.0)
    # Centred, as S may be renormalised on its support; where it is not, S adds no gradient.
    centred = values - s * values.sum(-1, keepdim=True)
    return centred, summands.clamp(max=clip).sum(-1)


def _expect(p: Tensor, x: Tensor) -> Tensor:
    """P * x with 0 * anything = 0: an impossible event has no say, whatever its log-ratio."""
    return torch.where(p > 0, p * x, 0.0)
