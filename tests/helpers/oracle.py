"""The loss in plain autograd, ten lines an objective: what the chunked kernel must equal."""

import math

import torch
from torch import Tensor


def divergence(alpha: float, log_s: Tensor, log_t: Tensor) -> Tensor:
    """[..., B] log-probs on a common support -> [...]; terms of probability zero count 0."""

    def expect(p: Tensor, x: Tensor) -> Tensor:
        return torch.where(p > 0, p * torch.where(p > 0, x, 0.0), 0.0).sum(-1)

    s, t = log_s.exp(), log_t.exp()
    if alpha == 0:
        return expect(t, log_t - log_s)
    if alpha == 1:
        return expect(s, log_s - log_t)
    log_m = torch.logaddexp(log_s + math.log1p(-alpha), log_t + math.log(alpha))
    return (1 - alpha) * expect(s, log_s - log_m) + alpha * expect(t, log_t - log_m)


def supported(z_s: Tensor, z_t: Tensor, *, k: int | None, tail: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of both on: everything (k None), the student's top-k renormalised, or + tail."""
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if k is None or k >= z_s.shape[-1]:
        return log_s, log_t
    top = z_s.topk(k, dim=-1).indices
    both = [x.gather(-1, top) for x in (log_s, log_t)]
    if not tail:
        return both[0].log_softmax(-1), both[1].log_softmax(-1)
    rests = [torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in both]
    return torch.cat([both[0], rests[0]], -1), torch.cat([both[1], rests[1]], -1)


def clipped_gradient(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(rho A, clip(rho) A)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
