"""The stream of a policy's weights to an engine: who reads it, and what an engine still needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from scsdpo.distributed import place
from scsdpo.policy import CausalLM
from scsdpo.policy.sharding import is_sharded
from scsdpo.rollout.weights.hashing import StreamHash
from scsdpo.rollout.weights.lora import LoraTransport, MergeRounding, check_targets, rank_for
from scsdpo.rollout.weights.views import (
    View,
    adapter_weights,
    base_digest,
    base_weights,
    merged_weights,
)

Weights = Callable[[torch.dtype], Iterator[tuple[str, Tensor]]]
"""A pass over all weights, as (name, value) pairs in the checkpoint's names, rounded to a dtype."""


class WeightStream:
    """Passes over views of a policy's weights, which in shards all ranks make together.

    All ranks make one, and close it. Without `led` every rank asks for the same passes. With it
    rank 0 alone asks, and closing lets the other ranks take part in what it asks for.

    Args:
        policy: whose weights.
        adapter: the engine's argument.
        led: by rank 0.

    Raises:
        ConfigurationError: if the adapter is to go `alone`, and cannot.
    """

    def __init__(self, policy: CausalLM, adapter: LoraTransport, *, led: bool) -> None:
        self.policy = policy
        self.rank = rank_for(policy, adapter)
        """`max_lora_rank` of an engine with room for the adapter; None: it is merged."""
        self.base = "" if self.rank is None else base_digest(policy)
        """Tells the base from another."""
        self._sharded = is_sharded(policy)
        self._led = led and self._sharded
        self._pass: Iterator[tuple[str, Tensor]] = iter(())

    def read(self, view: View, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, value) pairs of a view, rounded to `dtype`; the last pass ends before."""
        self._finish()
        if self._led:
            _from_rank_0((view, dtype))
        self._pass = view(self.policy, dtype)
        return self._pass

    def close(self) -> None:
        """End the last pass; with `led`, on ranks other than 0, take part in rank 0's passes."""
        self._finish()
        if not self._led:
            return
        if place()[0] == 0:
            _from_rank_0(None)
            return
        while (asked := _from_rank_0(None)) is not None:
            view, dtype = asked
            for _ in view(self.policy, dtype):
                pass

    def _finish(self) -> None:
        """Go on to the end, for the other ranks gather with this one until then."""
        if self._sharded:
            for _ in self._pass:
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _from_rank_0(asked: tuple[View, torch.dtype] | None) -> tuple[View, torch.dtype] | None:
    """What rank 0 asks for; None: nothing more."""
    said = [asked]
    dist.broadcast_object_list(said)
    return said[0]


class Sink(ABC):
    """An engine's end of the stream: in this process, files, or NCCL."""

    due = False
    """Whether the engine lost what it had, though the weights are the same."""

    def __init__(self) -> None:
        self._base = ""
        self.base_hash = StreamHash()
        """Of the base that was sent last."""
        self._rounding = MergeRounding()

    @abstractmethod
    def load(self, weights: Weights, version: str, dtype: torch.dtype) -> None:
        """Let the engine have these weights.

        Args:
            weights: any number of passes; each is iterated to its end.
            version: their label.
            dtype: of the engine.
        """

    @abstractmethod
    def load_adapter(self, weights: dict[str, Tensor], version: str) -> None:
        """Let the engine have an adapter beside the weights that were loaded last.

        Args:
            weights: of `adapter_weights`.
            version: label of base and adapter together.
        """

    def send(
        self, stream: WeightStream, version: str, dtype: torch.dtype, supported: list[str] | None
    ) -> None:
        """Bring the policy's weights: all of them, or the base if it changed, and the adapter.

        Args:
            stream: of the policy.
            version: label of its weights.
            dtype: of the engine.
            supported: last parts of names of modules that it can adapt; None: LoRA is merged.

        Raises:
            ConfigurationError: if the engine has no adapters for layers that have one.
        """
        if supported is None:
            self.forget()
            self._rounding.look(stream.policy, dtype)
            self.load(partial(stream.read, merged_weights), version, dtype)
            return
        if stream.base != self._base or self.due:

            def base(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
                self.base_hash = StreamHash()
                return self.base_hash.over(stream.read(base_weights, dtype))

            self.forget()
            self.load(base, f"base-{stream.base}", dtype)
            self._base = stream.base
        weights = dict(stream.read(adapter_weights, dtype))
        check_targets(weights, supported)
        self.load_adapter(weights, version)

    def forget(self) -> None:
        """Nothing is known of what the engine has."""
        self._base = ""
