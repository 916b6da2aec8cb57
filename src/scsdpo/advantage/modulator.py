"""Factors on a rollout's advantage at each token, which place the credit within the response."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scsdpo.contracts import declared
from scsdpo.distributed import all_values
from scsdpo.loss import Chunk, Derivation, NeedsSignals, Signals
from scsdpo.weighting.tokens import check_contrast, contrast


class Modulator(NeedsSignals, ABC):
    """A factor on the rollout's advantage at each token. The PPO clip applies to the product."""

    @declared
    def needs_teacher(self) -> bool:
        """True if it reads the teacher."""
        return True

    @declared
    def contexts(self) -> int:
        """Number of contexts that the teacher must have (`Contexts`)."""
        return 1

    @abstractmethod
    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        """The factor [n] >= 0 on `advantage` [n]; used only where the rollout has a teacher."""


@dataclass(frozen=True)
class Unmodulated(Modulator):
    """The factor 1 everywhere."""

    @property
    def needs_teacher(self) -> bool:
        return False

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        return torch.ones_like(advantage)


@dataclass(frozen=True, kw_only=True)
class TeacherRatio(Modulator):
    """RLSD's factor: (1 - mix) + mix clip(exp(sign(A) (log T(y) - log S(y))), 1 -+ band)

    More credit goes to those tokens of a success that the teacher prefers to the student, and more
    blame to those tokens of a failure that it prefers less. Detached. mix = 0 is `Unmodulated`.

    Args:
        mix: weight of the teacher's ratio, in [0, 1].
        band: half width of the clip around 1, >= 0.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        RLSD, arXiv:2604.03128.
    """

    mix: float = 0.5
    band: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"`TeacherRatio(mix=...)` must be in [0, 1], got {self.mix}")
        if self.band < 0:
            raise ValueError(f"`TeacherRatio(band=...)` must be >= 0, got {self.band}")

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        difference = chunk.teacher().logprob(chunk.ids) - chunk.logprob
        ratio = (advantage.sign() * difference).exp().clamp(1 - self.band, 1 + self.band)
        return 1 - self.mix + self.mix * ratio


@dataclass(frozen=True, kw_only=True)
class TeacherInfluence(Modulator):
    """SC-GRPO's factor: D_t / (D_t + c), D_t = KL(T_t || S_t) over the whole vocabulary

        c = max(the `quantile` of D over the step's tokens with a teacher, on all ranks; floor)

    Credit goes to the tokens where the teacher's context changes its distribution. The policy
    gradient alone gives its sign, in right and wrong rollouts alike. Detached, in [0, 1). D is
    measured before the loss, in a second pass over the vocabulary.

    Args:
        quantile: quantile of D, in [0, 1]; it is interpolated linearly between two values.
        floor: least c, in nats, > 0.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        SC-GRPO, arXiv:2606.18810 (.75 and 1e-4; its quantile is that of a micro-batch).
    """

    quantile: float = 0.75
    floor: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(
                f"`TeacherInfluence(quantile=...)` must be in [0, 1], got {self.quantile}"
            )
        if not self.floor > 0:
            raise ValueError(f"`TeacherInfluence(floor=...)` must be > 0, got {self.floor}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_kl"})

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (self.influence,)

    def influence(self, signals: Signals) -> Tensor:
        """[R, L] in [0, 1): D / (D + c)."""
        kl = signals.teacher_kl
        taught = kl[signals.mask & (kl > 0)]  # rows without a teacher have 0
        everyone = all_values(taught.cpu()).numpy()  # torch.quantile refuses large tensors
        c = float(np.quantile(everyone, self.quantile)) if len(everyone) else 0.0
        return kl / (kl + max(c, self.floor))

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        return chunk.derived(self.influence)


@dataclass(frozen=True, kw_only=True)
class SignAgreement(Modulator):
    """factor = 1 where sign(A) (log T(y) - log S(y)) >= margin, else `otherwise`

    A token of a success keeps its credit where the teacher gives it at least the student's
    probability, and a token of a failure keeps its blame where the teacher gives it at most that.
    The policy gradient gives the direction, and the teacher can only veto it. Detached.
    otherwise = 1 is `Unmodulated`.

    Args:
        margin: least value of sign(A) (log T(y) - log S(y)), in nats; it may be negative.
        otherwise: factor where teacher and policy gradient do not agree, in [0, 1].

    Raises:
        ValueError: if `otherwise` is outside its range.

    Source:
        Ours: the hard form of RLSD's factor (`TeacherRatio`), arXiv:2604.03128.
    """

    margin: float = 0.0
    otherwise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.otherwise <= 1:
            raise ValueError(
                f"`SignAgreement(otherwise=...)` must be in [0, 1], got {self.otherwise}"
            )

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        difference = chunk.teacher().logprob(chunk.ids) - chunk.logprob
        agree = advantage.sign() * difference >= self.margin
        return torch.where(agree, 1.0, self.otherwise).to(advantage.dtype)


@dataclass(frozen=True, kw_only=True)
class Surprise(Modulator):
    """factor = min(exp(sharpness d), cap), d = max(log S(y) - log T(y) - margin, 0)

    Tokens that the student gives more probability than the teacher weigh more, formatting and
    connectives too. DRIFT adds a gate (`Rhythm`). Detached; >= 1.

    Args:
        sharpness: slope of the exponent, per nat, >= 0; 0 is `Unmodulated`.
        margin: a log-ratio up to this, in nats, does not count.
        cap: largest factor, >= 1.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        DRIFT, arXiv:2606.30345.
    """

    sharpness: float = 1.0
    margin: float = 0.0
    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError(
                f"`{type(self).__name__}(sharpness=...)` must be >= 0, got {self.sharpness}"
            )
        if self.cap < 1:
            raise ValueError(f"`{type(self).__name__}(cap=...)` must be >= 1, got {self.cap}")

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        excess = chunk.logprob - chunk.teacher().logprob(chunk.ids) - self.margin
        return (self.sharpness * excess.clamp(min=0)).exp().clamp(max=self.cap)


@dataclass(frozen=True, kw_only=True)
class Rhythm(Surprise):
    """DRIFT's factor: 1 + gate_t (s_t - 1), s_t the factor of `Surprise`; detached, in [1, cap]

    The gate opens at tokens where the teacher's entropy falls, the student's does not, and the
    student's is the larger one. With H the entropy and m the student or the teacher,

        drop_m(t) = max(mean of H_m over `window` tokens before t - the mean over those after t, 0)
        a_t       = max(drop_T(t) - drop_S(t), 0) max(H_S(t) - H_T(t), 0)
        z_t       = (a_t - mean a) / std a              over the response; population std
        r_t       = 1 + gain 2 max(sigmoid(steepness z_t) - 1/2, 0)
        gate_t    = ((min(r_t / mean r, highest) - 1) / (highest - 1)), and 0 where that is < 0

    Only tokens above the response's mean have a gate above 0. The paper's lower clip m_min <= 1 of
    r_t / mean r cannot change the gate, and is left out.

    Windows leave out t itself and end where the response does. The drop is 0 where a window has no
    token, and z is 0 where a does not vary. These choices are ours; the paper does not state its
    own.

    Both entropies are measured before the loss, in a second pass over the vocabulary.

    Args:
        sharpness: as in `Surprise`.
        margin: as in `Surprise`.
        cap: as in `Surprise`.
        window: number of tokens on each side, >= 1.
        steepness: steepness of the sigmoid, > 0.
        gain: factor in r_t, > 0.
        highest: value of r_t / mean r from which the gate is 1, > 1.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        DRIFT, arXiv:2606.30345v1, eq. (9) to (16). It does not state the constants: all are ours.
    """

    window: int = 8
    steepness: float = 1.0
    gain: float = 1.0
    highest: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"`Rhythm(window=...)` must be >= 1, got {self.window}")
        for name, least in (("steepness", 0), ("gain", 0), ("highest", 1)):
            if not getattr(self, name) > least:
                raise ValueError(
                    f"`Rhythm({name}=...)` must be > {least}, got {getattr(self, name)}"
                )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student_entropy", "teacher_entropy"})

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (self.gate,)

    def gate(self, signals: Signals) -> Tensor:
        """[R, L] in [0, 1]; 0 where the policy drew no token."""
        # In episodes, sort the sampled tokens to the front, so that windows hold no other tokens.
        order = signals.mask.logical_not().int().argsort(dim=-1, stable=True)
        mask = signals.mask.gather(-1, order)
        student = torch.where(mask, signals.student_entropy.gather(-1, order), 0.0)
        teacher = torch.where(mask, signals.teacher_entropy.gather(-1, order), 0.0)
        wider = self._drop(teacher, mask) - self._drop(student, mask)
        anchor = wider.clamp(min=0) * (student - teacher).clamp(min=0)
        centred = torch.where(mask, anchor - _row_mean(anchor, mask), 0.0)
        std = _row_mean(centred.square(), mask).sqrt()
        z = torch.where(std > 1e-12, centred / std, 0.0)  # less is rounding
        raised = 1 + self.gain * 2 * (torch.sigmoid(self.steepness * z) - 0.5).clamp(min=0)
        relative = (raised / _row_mean(raised, mask)).clamp(max=self.highest)
        gate = torch.where(mask, ((relative - 1) / (self.highest - 1)).clamp(min=0), 0.0)
        return torch.zeros_like(gate).scatter(-1, order, gate)

    def _drop(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """[R, L] >= 0: mean entropy before each token minus the mean after it."""
        sums = torch.nn.functional.pad(entropy.cumsum(-1), (1, 0))
        counts = torch.nn.functional.pad(mask.double().cumsum(-1), (1, 0))
        here = torch.arange(mask.shape[1], device=mask.device)
        end = (here + 1 + self.window).clamp(max=mask.shape[1])
        sides = ((here - self.window).clamp(min=0), here), (here + 1, end)
        means = []
        for first, last in sides:
            total, count = (table[:, last] - table[:, first] for table in (sums, counts))
            means.append(torch.where(count > 0, total / count, torch.nan))
        return (means[0] - means[1]).nan_to_num().clamp(min=0)

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        return 1 + chunk.derived(self.gate) * (super().factor(chunk, advantage) - 1)


def _row_mean(table: Tensor, mask: Tensor) -> Tensor:
    """[R, 1]: the mean over each row's tokens; 0 in rows without tokens."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, table, 0.0).sum(-1, keepdim=True) / count


@dataclass(frozen=True, kw_only=True)
class SiblingContrast(Modulator):
    """RLCSD's factor: max(0, 1 + r_t / A), so that A becomes A + r_t and never changes its sign

        e_t = log T(y_t | a right sibling) - mean_k log T(y_t | wrong sibling k)
        r_t = scale tanh(e_t / width), and 0 where |r_t| <= threshold

    The teacher's contexts are a right sibling and one or more wrong ones (`Contexts` of
    `SiblingDemonstration` and `FailedSibling`); the mean is over those that the rollout has. Tokens
    with r_t = 0 keep A. `ContrastPaths` normalises tokens with and without r_t separately.
    Detached.

    Args:
        scale: scale of r_t, in units of the advantage, > 0.
        width: width of the tanh, in nats, > 0.
        threshold: |r_t| up to this counts as 0, >= 0.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        RLCSD, arXiv:2606.11709, eq. (8) to (17). The values are ours.
    """

    scale: float = 0.5
    width: float = 1.0
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_contrast(type(self).__name__, self.scale, self.width, self.threshold)

    @property
    def contexts(self) -> int:
        return 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_logprob", "others"})

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        return (self.shift,)

    def shift(self, signals: Signals) -> Tensor:
        """[R, L]: r_t."""
        return contrast(signals, self.scale, self.width, self.threshold)

    def factor(self, chunk: Chunk, advantage: Tensor) -> Tensor:
        return (1 + chunk.derived(self.shift) / advantage).clamp(min=0)
