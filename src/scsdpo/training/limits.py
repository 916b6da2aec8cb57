"""Where an optimizer step, and where a run, must end."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import PositiveInt

from scsdpo.policy import CausalLM


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Limits:
    """Bounds on a step's gradient and memory, and on steps and batches that achieve nothing.

    Args:
        max_grad_norm: clip on the gradient's norm. inf: none.
        max_tokens: distinct tokens whose activations are in memory at a time; `auto` measures
            how many fit. It changes memory and speed, and no number.
        max_bad_steps: non-finite steps in a row after which the run stops.
        max_idle_batches: batches in a row without anything to learn from after which it stops:
            they take no step, so that `trainer.max_steps` alone would wait for ever.

    Raises:
        ValueError: if an argument is outside its range.
    """

    max_grad_norm: float = 1.0
    max_tokens: PositiveInt | Literal["auto"] = "auto"
    max_bad_steps: int = 5
    max_idle_batches: int = 100

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"`Limits(max_grad_norm=...)` must be > 0 (.inf: no clipping), "
                f"got {self.max_grad_norm}"
            )
        for name in ("max_bad_steps", "max_idle_batches"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`Limits({name}=...)` must be >= 1, got {value}")

    def token_budget(self, policy: CausalLM) -> int:
        """Tokens at a time, as memory is now."""
        return policy.token_budget() if self.max_tokens == "auto" else self.max_tokens
