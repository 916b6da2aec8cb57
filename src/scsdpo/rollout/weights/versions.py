"""Labels of the policy's weights, by which trainer and engine tell whether they have the same."""

import secrets
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from scsdpo.distributed import place
from scsdpo.private.torch import default_store, load_hooks
from scsdpo.rollout.weights.hashing import GLIMPSE, digest


class _Moves:
    """Counts of optimizer steps and of loads in this process: the same on every rank."""

    steps = 0
    loads = 0


def _stepped(*_: object) -> None:
    _Moves.steps += 1


def _loaded(*_: object) -> None:
    _Moves.loads += 1


# In-place counters would not do: fused optimizers write without being counted.
register_optimizer_step_post_hook(_stepped)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """State of weights as far as it is known without reading all of them."""

    steps: int
    others: tuple[int, int, int]
    """Which policy, loads, and moves by hand."""
    glimpse: str

    def only_stepped_since(self, before: "_Seen | None") -> bool:
        """True if nothing but optimizer steps may have changed them."""
        return before is not None and self.steps > before.steps and self.others == before.others


class Versions:
    """Labels `RUN.DIGEST.MOVES`; weights that differ never have the same.

    RUN is drawn at random, once for all ranks. MOVES counts optimizer steps, loads of state dicts
    and calls of `moved`. DIGEST is `hashing.digest` as it was last taken: at the start, after a
    load, every `digest_every` optimizer steps, and when weights were written by hand. The latter
    is noticed by comparing `GLIMPSE` evenly spread elements of each parameter at every call; who
    writes fewer than all elements of a parameter says so with `moved`.

    Args:
        digest_every: optimizer steps after which all bits are looked at again. Must be >= 1.

    Raises:
        ValueError: if `digest_every` < 1.
    """

    def __init__(self, digest_every: int = 100) -> None:
        if digest_every < 1:
            raise ValueError(f"`VLLMRollout(digest_every=...)` must be >= 1, got {digest_every}")
        self.digest_every = digest_every
        self._run = ""
        self._by_hand = 0
        self._seen: _Seen | None = None
        self._digest, self._digested_at = "", 0

    def of(self, policy: nn.Module) -> str:
        """The label of the policy's weights as they are now; under shards all ranks ask in step."""
        if _loaded not in load_hooks(policy).values():
            policy.register_load_state_dict_post_hook(_loaded)
            self._seen = None
        seen = _Seen(
            steps=_Moves.steps,
            others=(id(policy), _Moves.loads, self._by_hand),
            glimpse=digest(policy, GLIMPSE),
        )
        if seen != self._seen:
            if not seen.only_stepped_since(self._seen) or (
                seen.steps - self._digested_at >= self.digest_every
            ):
                self._digest, self._digested_at = digest(policy), seen.steps
            self._seen = seen
        return f"{self._agreed()}.{self._digest}.{seen.steps + _Moves.loads + self._by_hand}"

    def moved(self) -> None:
        """The weights were written by other means than an optimizer or a state dict."""
        self._by_hand += 1

    def _agreed(self) -> str:
        """RUN, the same on every rank: whoever asks first decides. No collective."""
        if not self._run:
            drawn = secrets.token_hex(4)
            if place()[1] > 1:
                store: Any = default_store()
                drawn = store.compare_set("scsdpo/weights", "", drawn).decode()
            self._run = drawn
        return self._run
