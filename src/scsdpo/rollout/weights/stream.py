"""The stream of a policy's weights to an engine.

A view says which weights: all of them with LoRA merged, the base, or the adapter. It is a generator
of (name, value) pairs, rounded to the engine's dtype, a layer at a time. Names are those of the
checkpoint, which may hold apart what transformers has fused, such as the matrices of each expert.
Under shards every rank must read a view to its end, in step, for weights are gathered. The policy's
own weights are not touched.

A `WeightStream` reads views on all ranks together. A `Sink` is an engine's end: what it still needs
of a policy's weights, and how it gets them.

An adapter alone is 2 percent of the merged weights at rank 32, and its small updates are not lost
to the rounding of the weights that they are added to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from scsdpo.distributed import place
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.adapter import STUDENT, adapted_ends, adapted_layers, is_tied, merged_layer
from scsdpo.policy.names import is_factor, plain_name
from scsdpo.policy.shard_loading import as_stored
from scsdpo.policy.sharding import is_sharded, reshard, whole_weight
from scsdpo.rollout.weights.hashing import GLIMPSE, StreamHash, digest

Pairs = Iterator[tuple[str, Tensor]]
View = Callable[[CausalLM, torch.dtype], Pairs]
"""Some of the policy's weights; a function that pickles."""
Weights = Callable[[torch.dtype], Pairs]
"""A pass over all weights that are sent, rounded to a dtype."""
LoraTransport = Literal["auto", "merged", "alone"]
"""The way that LoRA reaches an engine: the engine's argument `adapter`."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `max_lora_rank` may have."""


@torch.no_grad()
def merged_weights(policy: CausalLM, dtype: torch.dtype | None = None) -> Pairs:
    """Every weight of the plain model; LoRA factors are merged into them.

    A tied head comes once, as the embedding, unless one of the two is adapted: then they are two
    tables.

    Args:
        policy: whose weights.
        dtype: to which they are rounded, before they are gathered; None: nothing is rounded.
    """
    model = policy.language_model
    reshard(model)
    adapted = adapted_layers(model)
    two_tables = is_tied(model) and bool(adapted_ends(model))
    done: set[str] = set()

    def plain() -> Pairs:
        for name, parameter in model.named_parameters(remove_duplicate=not two_tables):
            owner = next((a for a in adapted if name.startswith(f"{a}.")), "")
            if not owner:
                yield name, whole_weight(parameter, dtype)
            elif owner not in done:
                done.add(owner)
                for inner, value in merged_layer(adapted[owner]).named_parameters():
                    yield f"{owner}.{inner}", value if dtype is None else value.to(dtype)

    yield from as_stored(model, plain())


@torch.no_grad()
def base_weights(policy: CausalLM, dtype: torch.dtype) -> Pairs:
    """Every weight of the model without its adapters, in plain numbers."""
    model = policy.language_model
    reshard(model)
    plain = (
        (plain_name(name), whole_weight(parameter, dtype))
        for name, parameter in model.named_parameters()
        if not is_factor(name)
    )
    yield from as_stored(model, plain)


def base_digest(policy: CausalLM) -> str:
    """Tells the base from another; of evenly spread elements, for nothing trains it."""
    return digest(policy, GLIMPSE, lambda name: not is_factor(name))


@torch.no_grad()
def adapter_weights(policy: CausalLM, dtype: torch.dtype) -> Pairs:
    """Every adapted layer's A and scale B, named after the layer.

    The scale (alpha / r, or alpha / sqrt(r)) is multiplied into B in float32, before the one
    rounding.
    """
    reshard(policy.language_model)
    for name, layer in policy.language_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        factors = layer.lora_A[STUDENT], layer.lora_B[STUDENT]
        a, b = (whole_weight(factor.weight).float() for factor in factors)
        yield f"{name}.lora_A.weight", a.to(dtype)
        yield f"{name}.lora_B.weight", (b * layer.scaling[STUDENT]).to(dtype)


def why_not_alone(policy: CausalLM) -> str:
    """Why the policy's adapter cannot be brought by itself, naming the key; '' if it can."""
    adapter = policy.adapter
    if not isinstance(adapter, Lora):
        return "model.policy.adapter is no Lora, all weights are trained"
    if adapter.use_dora:
        return "vLLM does not know DoRA (model.policy.adapter.use_dora)"
    if adapter.r > RANKS[-1]:
        return f"vLLM knows ranks up to {RANKS[-1]} (model.policy.adapter.r is {adapter.r})"
    for name, layer in adapted_layers(policy.language_model).items():
        if isinstance(layer, ParamWrapper):
            return f"{name} is no layer (model.policy.adapter.target_parameters)"
        if name in adapted_ends(policy.language_model):
            return f"vLLM adapts no embedding and no head, and {name} has an adapter"
    return ""


def rank_for(policy: CausalLM, adapter: LoraTransport) -> int | None:
    """`max_lora_rank` of an engine with room for the adapter; None if it is merged.

    Args:
        policy: whose adapter; loaded, for its layers are looked at.
        adapter: the engine's argument.

    Raises:
        ConfigurationError: if it is to be `alone`, and cannot be; if embedding or head is adapted
            and they are one table.
    """
    model, why_not = policy.language_model, why_not_alone(policy)
    if (ends := adapted_ends(model)) and is_tied(model):
        raise ConfigurationError(
            f"model.policy.adapter.target_modules: {ends[0]} has an adapter, and embedding and "
            "head of this model are one table, which vLLM reads for both: leave it out, or sample "
            "with HFRollout"
        )
    if adapter == "alone" and why_not:
        raise ConfigurationError(f"model.rollout.engine.adapter: alone is not possible: {why_not}")
    if adapter == "merged" or why_not:
        return None
    assert isinstance(policy.adapter, Lora)
    return next(rank for rank in RANKS if rank >= policy.adapter.r)


def check_targets(weights: dict[str, Tensor], supported: list[str]) -> None:
    """Refuse layers that the engine has no adapters for.

    Args:
        weights: of `adapter_weights`.
        supported: last parts of names of modules, as `WeightReceiver.scsdpo_describe` says.
    """
    targets = {name.split(".")[-3] for name in weights}
    if others := sorted(targets - set(supported)):
        raise ConfigurationError(
            f"model.policy.adapter.target_modules: vLLM has no adapters for {', '.join(others)} of "
            "this model: leave them out (exclude_modules), or set model.rollout.engine.adapter to "
            "merged"
        )


class MergeRounding:
    """Says once what of LoRA's change is lost when it is merged into rounded weights."""

    _LAYERS, _ENOUGH = 8, 0.9

    def __init__(self) -> None:
        self._looked = False

    def look(self, policy: CausalLM, dtype: torch.dtype) -> None:
        """At the first delivery that changes anything; not under shards or DoRA.

        Args:
            policy: about to be merged.
            dtype: of the engine's weights.
        """
        adapter = policy.adapter
        if self._looked or dtype.itemsize >= 4 or is_sharded(policy):
            return
        if not isinstance(adapter, Lora) or adapter.use_dora:
            return
        every = adapted_layers(policy.language_model).values()
        layers = [layer for layer in every if isinstance(layer.get_base_layer(), nn.Linear)]
        if not layers:
            return
        share = share_kept(layers[:: -(-len(layers) // self._LAYERS)], dtype)
        self._looked = share is not None
        if share is not None and share < self._ENOUGH:
            rank_zero_info(
                f"LoRA merged into {str(dtype).removeprefix('torch.')} weights for vLLM: of the "
                f"weights that it changes {share:.0%} come out changed, the rest is lost to "
                "rounding; model.rollout.engine.adapter: alone loses none"
            )


@torch.no_grad()
def share_kept(layers: Sequence[LoraLayer], dtype: torch.dtype) -> float | None:
    """Among weights with W + scale B A != W, the share that differs after both are rounded.

    Returns:
        In [0, 1]; None if nothing is changed.
    """
    changed = kept = 0
    for layer in layers:
        base: Any = layer.get_base_layer()
        merged: Any = merged_layer(layer)
        new, old = merged.weight, whole_weight(base.weight)
        changed += int((new != old).sum())
        kept += int((new.to(dtype) != old.to(dtype)).sum())
    return kept / changed if changed else None


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
        self._pass: Pairs = iter(())

    def read(self, view: View, dtype: torch.dtype) -> Pairs:
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


def _from_rank_0(asked: tuple[View, torch.dtype] | None) -> tuple[View, torch.dtype] | None:
    """Rank 0's next pass, on all ranks; None: there is none."""
    said = [asked]
    dist.broadcast_object_list(said)
    return said[0]


class Sink(ABC):
    """An engine's end of the stream: in this process, files, or NCCL."""

    due = False
    """The engine lost what it had, though the policy's weights are the same."""

    def __init__(self) -> None:
        self._base = ""
        self.base_hash = StreamHash()
        """Hash of the base that was sent last."""
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

            def base(dtype: torch.dtype) -> Pairs:
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
