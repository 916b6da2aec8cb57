"""Passes over the policy's weights, which in shards all ranks make together."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from scsdpo.policy import CausalLM
from scsdpo.policy.sharding import is_sharded
from scsdpo.rollout.weights.weights import merged_weights

Of = Callable[[CausalLM, torch.dtype], Iterator[tuple[str, Tensor]]]
"""Some of the policy's weights; a function that pickles."""


class WeightPasses:
    """On rank 0 each call is another pass over all weights; other ranks `follow` until it closes.

    Args:
        policy: whose weights.
    """

    def __init__(self, policy: CausalLM) -> None:
        self.policy = policy
        self._together = is_sharded(policy)
        self._pass: Iterator[tuple[str, Tensor]] = iter(())

    def __call__(self, dtype: torch.dtype, of: Of = merged_weights) -> Iterator[tuple[str, Tensor]]:
        """(name, value) pairs in the checkpoint's names, rounded to `dtype`.

        Args:
            dtype: of the servers.
            of: which of the policy's weights.
        """
        self._finish()
        self._told((of, dtype))
        self._pass = of(self.policy, dtype)
        return self._pass

    def close(self) -> None:
        """There are no more."""
        self._finish()
        self._told(None)

    def follow(self) -> None:
        """Take part in rank 0's passes."""
        while self._together and (told := self._told(None)) is not None:
            of, dtype = told
            for _ in of(self.policy, dtype):
                pass

    def _finish(self) -> None:
        """Go on to the end, where the other ranks go as well."""
        if self._together:
            for _ in self._pass:
                pass

    def _told(self, told: tuple[Of, torch.dtype] | None) -> tuple[Of, torch.dtype] | None:
        """What rank 0 says."""
        said = [told]
        if self._together:
            dist.broadcast_object_list(said)
        return said[0]
