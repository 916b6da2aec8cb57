"""Labels of the policy's weights. Trainer and engine compare them to tell if theirs are equal."""

import secrets
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from scsdpo.distributed import rank_and_size
from scsdpo.private.torch import default_store, load_hooks
from scsdpo.rollout.weights.hashing import GLIMPSE, weights_digest


class _Moves:
    """Numbers of optimizer steps and of loaded state dicts in this process; equal on all ranks."""

    steps = 0
    loads = 0


def _stepped(*_: object) -> None:
    _Moves.steps += 1


def _loaded(*_: object) -> None:
    _Moves.loads += 1


# A tensor's `_version` would not do: fused optimizers write without increasing it.
register_optimizer_step_post_hook(_stepped)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """State of weights as far as it is known without reading all of them."""

    steps: int
    """Number of optimizer steps."""
    others: tuple[int, int, int]
    """(id of the policy, number of loads, calls of `moved`)."""
    glimpse: str
    """Digest of `GLIMPSE` elements of each parameter."""

    def only_stepped_since(self, before: "_Seen | None") -> bool:
        """True if only optimizer steps can have changed the weights."""
        return before is not None and self.steps > before.steps and self.others == before.others


class Versions:
    """Labels `RUN.DIGEST.MOVES` of weights; weights that differ never have the same label.

    RUN is drawn at random, once for all ranks. MOVES counts optimizer steps, loads of state dicts
    and calls of `moved`. DIGEST is the last `weights_digest`: it is computed at the start, after a
    load, every `digest_every` optimizer steps, and after other code wrote weights. To notice that,
    each call compares `GLIMPSE` evenly spread elements of each parameter. Code that writes only
    some elements of a parameter must call `moved`.

    Args:
        digest_every: optimizer steps after which all weights are hashed again. Must be >= 1.

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
        """The label of the policy's current weights; a collective if they are sharded."""
        if _loaded not in load_hooks(policy).values():
            policy.register_load_state_dict_post_hook(_loaded)
            self._seen = None
        seen = _Seen(
            steps=_Moves.steps,
            others=(id(policy), _Moves.loads, self._by_hand),
            glimpse=weights_digest(policy, GLIMPSE),
        )
        if seen != self._seen:
            if not seen.only_stepped_since(self._seen) or (
                seen.steps - self._digested_at >= self.digest_every
            ):
                self._digest, self._digested_at = weights_digest(policy), seen.steps
            self._seen = seen
        return f"{self._agreed()}.{self._digest}.{seen.steps + _Moves.loads + self._by_hand}"

    def moved(self) -> None:
        """Say that weights were written by other means than an optimizer or a state dict."""
        self._by_hand += 1

    def _agreed(self) -> str:
        """RUN, the same on every rank: the first rank to ask decides. It is no collective."""
        if not self._run:
            drawn = secrets.token_hex(4)
            if rank_and_size()[1] > 1:
                store: Any = default_store()
                drawn = store.compare_set("scsdpo/weights", "", drawn).decode()
            self._run = drawn
        return self._run
