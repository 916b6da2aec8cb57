"""Passes over the policy's weights, which in shards all ranks make together."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from scsdpo.policy import CausalLM
from scsdpo.policy.sharding import is_sharded
from scsdpo.rollout.weights import merged_weights


class WeightPasses:
    """On rank 0 each call is another pass over all weights; other ranks `follow` until it closes.

    Args:
        policy: whose weights.
    """

    def __init__(self, policy: CausalLM) -> None:
        self.policy = policy
        self._together = is_sharded(policy)
        self._pass: Iterator[tuple[str, Tensor]] = iter(())

    def __call__(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, value) pairs in the checkpoint's names, rounded to `dtype`."""
        self._finish()
        self._told(dtype)
        self._pass = merged_weights(self.policy, dtype)
        return self._pass

    def close(self) -> None:
        """There are no more."""
        self._finish()
        self._told(None)

    def follow(self) -> None:
        """Take part in rank 0's passes."""
        while self._together and (dtype := self._told(None)) is not None:
            for _ in merged_weights(self.policy, dtype):
                pass

    def _finish(self) -> None:
        """Go on to the end, where the other ranks go as well."""
        if self._together:
            for _ in self._pass:
                pass

    def _told(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """What rank 0 says."""
        said = [dtype]
        if self._together:
            dist.broadcast_object_list(said)
        return said[0]
