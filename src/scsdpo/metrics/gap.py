"""The gap between the sampler's log-probs and the trainer's, and its limits."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scsdpo.distributed import all_max, all_sum
from scsdpo.errors import TrainingStopped


@dataclass(frozen=True, kw_only=True)
class GapCheck:
    """Limits on each step's gap_t = |log S_trainer(y_t) - log S_sampler(y_t)|.

    The gap is in nats, >= 0, over the tokens that are trained on. It is 0 but for rounding if the
    sampler had the policy's weights and computes as the trainer does. Dropout in the trainer and
    another precision in the sampler are part of it. The reward may rise for long while a stale
    sampler's gap grows, so the mean gap is checked before the step is taken. With several updates
    on one batch the trainer's weights are those before the first of them.

    Args:
        token: tokens with a larger gap than this, in nats, count for the logged share.
        warn: a step with a larger mean gap than this, in nats, gives a warning. inf: none does.
        stop: a step with a larger mean gap than this, in nats, ends the run. inf: none does.

    Raises:
        ValueError: if a limit is negative, or `stop` is below `warn`.
    """

    token: float = 0.5
    warn: float = 0.05
    stop: float = 0.2

    def __post_init__(self) -> None:
        for name in ("token", "warn"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"`GapCheck({name}=...)` must be >= 0, got {value}")
        if not self.stop >= self.warn:
            raise ValueError(
                f"`GapCheck(stop=...)` must be at least warn ({self.warn}), got {self.stop}"
            )

    def measure(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Mean gap, largest gap and share above `token`, over all ranks; empty if none is known.

        Args:
            pairs: log-probs of the same tokens by trainer and sampler, in any shape; nan on
                either side: not known, left out.
        """
        gaps = [(one.double() - other.double()).abs().flatten() for one, other in pairs]
        # Sums stay on the device until the end: reading one waits for all queued kernels.
        gap = torch.cat(gaps) if gaps else torch.zeros(0, dtype=torch.float64)
        known = gap.where(~gap.isnan(), 0.0)
        sums = known.sum(), (known > self.token).double().sum(), (~gap.isnan()).double().sum()
        worst = all_max(torch.cat([known, known.new_zeros(1)]).max())
        total, beyond, count, most = torch.stack([*all_sum(torch.stack(sums)), worst]).tolist()
        if count == 0:
            return {}
        return {
            "logprob_gap": total / count,
            "logprob_gap_max": most,
            "logprob_gap_share": beyond / count,
        }

    def judge(self, measured: dict[str, float]) -> None:
        """Warn or stop, from what `measure` returned.

        Raises:
            TrainingStopped: if the mean is above `stop`.
        """
        mean = measured.get("logprob_gap", 0.0)
        if mean <= self.warn:
            return
        said = (
            f"sampler and trainer disagree by {mean:.3g} nats a token (largest "
            f"{measured['logprob_gap_max']:.3g}, {measured['logprob_gap_share']:.1%} of the tokens "
            f"beyond {self.token:g})"
        )
        if mean > self.stop:
            raise TrainingStopped(
                f"{said}, more than model.gap.stop={self.stop:g}; no step was taken. The sampler "
                "uses other weights or other numerics: compare its dtype, its chat template "
                "and its log-prob settings with the trainer's (docs/vllm.md)"
            )
        rank_zero_warn(f"{said}, more than model.gap.warn={self.warn:g}")
