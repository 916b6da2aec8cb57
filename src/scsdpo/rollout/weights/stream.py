"""Sending a policy's weights to an engine.

A view is a generator of (name, value) pairs, rounded to the engine's dtype, a layer at a time:
all weights with LoRA merged, the base, or the adapter. Names are those of the checkpoint, which may
split what transformers has fused, such as the matrices of each expert. If weights are sharded, a
view gathers them, so all ranks must read it to its end. The policy's own weights do not change.

A `WeightStream` reads views on all ranks together. A `Sink` belongs to an engine: it decides which
weights the engine still needs, and loads them there.

At rank 32 an adapter has 2 percent of the bytes of the merged weights. Sent alone, its small
updates are not lost to the rounding of the weights that they are added to.
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

from scsdpo.distributed import rank_and_size
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.adapter import STUDENT, adapted_ends, adapted_layers, is_tied, merged_layer
from scsdpo.policy.names import is_factor, plain_name
from scsdpo.policy.shard_loading import as_stored
from scsdpo.policy.sharding import is_sharded, reshard, whole_weight
from scsdpo.rollout.weights.hashing import GLIMPSE, StreamHash, weights_digest

Pairs = Iterator[tuple[str, Tensor]]
View = Callable[[CausalLM, torch.dtype], Pairs]
"""Yields some of the policy's weights; a function that pickles."""
WeightPass = Callable[[torch.dtype], Pairs]
"""Makes a pass over all weights to send, rounded to a dtype."""
LoraTransport = Literal["auto", "merged", "alone"]
"""How LoRA is sent to an engine; the engine's argument `adapter`."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `max_lora_rank` may have."""


@torch.no_grad()
def merged_weights(policy: CausalLM, dtype: torch.dtype | None = None) -> Pairs:
    """Every weight of the model without adapters, with LoRA factors merged.

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
    """Every weight of the model without its adapters, dequantised."""
    model = policy.language_model
    reshard(model)
    plain = (
        (plain_name(name), whole_weight(parameter, dtype))
        for name, parameter in model.named_parameters()
        if not is_factor(name)
    )
    yield from as_stored(model, plain)


def base_digest(policy: CausalLM) -> str:
    """Digest of the base weights, from evenly spread elements: the base is never trained."""
    return weights_digest(policy, GLIMPSE, lambda name: not is_factor(name))


@torch.no_grad()
def adapter_weights(policy: CausalLM, dtype: torch.dtype) -> Pairs:
    """Every adapted layer's A and scale B, named after the layer.

    B is multiplied by the scale (alpha / r, or alpha / sqrt(r)) in float32, and then rounded once.
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
    """Why the adapter cannot be sent without the merged weights, with the key; '' if it can."""
    adapter = policy.adapter
    if not isinstance(adapter, Lora):
        return "model.policy.adapter is not a Lora, all weights are trained"
    if adapter.use_dora:
        return "vLLM does not support DoRA (model.policy.adapter.use_dora)"
    if adapter.r > RANKS[-1]:
        return f"vLLM supports ranks up to {RANKS[-1]} (model.policy.adapter.r is {adapter.r})"
    for name, layer in adapted_layers(policy.language_model).items():
        if isinstance(layer, ParamWrapper):
            return f"{name} is not a layer (model.policy.adapter.target_parameters)"
        if name in adapted_ends(policy.language_model):
            return f"vLLM adapts neither embedding nor head, and {name} has an adapter"
    return ""


def rank_for(policy: CausalLM, adapter: LoraTransport) -> int | None:
    """`max_lora_rank` that an engine needs for the policy's adapter; None if LoRA is merged.

    Args:
        policy: with loaded weights.
        adapter: the engine's argument.

    Raises:
        ConfigurationError: if `adapter` is `alone` and that is not possible; if embedding and head
            are tied and one of them is adapted.
    """
    model, why_not = policy.language_model, why_not_alone(policy)
    if (ends := adapted_ends(model)) and is_tied(model):
        raise ConfigurationError(
            f"model.policy.adapter.target_modules: {ends[0]} has an adapter, but embedding and "
            "head of this model are one table, and vLLM cannot untie them: leave it out, or sample "
            "with HFRollout"
        )
    if adapter == "alone" and why_not:
        raise ConfigurationError(f"model.rollout.engine.adapter: alone is not possible: {why_not}")
    if adapter == "merged" or why_not:
        return None
    assert isinstance(policy.adapter, Lora)
    return next(rank for rank in RANKS if rank >= policy.adapter.r)


def check_targets(weights: dict[str, Tensor], supported: list[str]) -> None:
    """Raise if the engine does not support adapters of some layers.

    Args:
        weights: from `adapter_weights`.
        supported: last parts of modules' names, from `WeightReceiver.scsdpo_describe`.

    Raises:
        ConfigurationError: if a layer is not among them.
    """
    targets = {name.split(".")[-3] for name in weights}
    if others := sorted(targets - set(supported)):
        raise ConfigurationError(
            "model.policy.adapter.target_modules: vLLM does not support adapters for "
            f"{', '.join(others)} of this model: leave them out (exclude_modules), or set "
            "model.rollout.engine.adapter to merged"
        )


class MergeRounding:
    """Reports once how much of LoRA's change is lost when it is merged into rounded weights."""

    _LAYERS, _ENOUGH = 8, 0.9
    """Number of layers to measure; share of changed weights below which it reports."""

    def __init__(self) -> None:
        self._looked = False

    def look(self, policy: CausalLM, dtype: torch.dtype) -> None:
        """Measure the first change, unless weights are sharded or the adapter is DoRA.

        Args:
            policy: the policy that will be merged.
            dtype: dtype of the engine's weights.
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
                f"LoRA is merged into {str(dtype).removeprefix('torch.')} weights for vLLM: only "
                f"{share:.0%} of the weights that LoRA changes still differ after rounding. To "
                "lose no change, set model.rollout.engine.adapter to alone"
            )


@torch.no_grad()
def share_kept(layers: Sequence[LoraLayer], dtype: torch.dtype) -> float | None:
    """Among weights with W + scale B A != W, the share that still differs after rounding both.

    Returns:
        In [0, 1]; None if no weight is changed.
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
    """Passes over views of a policy's weights, which all ranks make together if it is sharded.

    All ranks construct a stream and close it. Without `led` every rank must ask for the same
    passes. With it only rank 0 asks, and in `close` the other ranks take part in its passes.

    Args:
        policy: the policy.
        adapter: the engine's argument.
        led: rank 0 decides which passes are made.

    Raises:
        ConfigurationError: if `adapter` is `alone` and that is not possible.
    """

    def __init__(self, policy: CausalLM, adapter: LoraTransport, *, led: bool) -> None:
        self.policy = policy
        self.rank = rank_for(policy, adapter)
        """`max_lora_rank` that the engine needs; None: LoRA is merged."""
        self.base = "" if self.rank is None else base_digest(policy)
        """Digest of the base; '' if LoRA is merged."""
        self._sharded = is_sharded(policy)
        self._led = led and self._sharded
        self._pass: Pairs = iter(())

    def read(self, view: View, dtype: torch.dtype) -> Pairs:
        """Pass over a view: (name, value) pairs rounded to `dtype`. It ends the pass before."""
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
        if rank_and_size()[0] == 0:
            _from_rank_0(None)
            return
        while (asked := _from_rank_0(None)) is not None:
            view, dtype = asked
            for _ in view(self.policy, dtype):
                pass

    def _finish(self) -> None:
        """Read the last pass to its end, because the other ranks gather in it too."""
        if self._sharded:
            for _ in self._pass:
                pass


def _from_rank_0(asked: tuple[View, torch.dtype] | None) -> tuple[View, torch.dtype] | None:
    """Broadcast rank 0's next pass to all ranks; None: there is none."""
    said = [asked]
    dist.broadcast_object_list(said)
    return said[0]


class Sink(ABC):
    """Loads weights into an engine: in this process, by files, or by NCCL."""

    due = False
    """True: the engine lost its weights, so they must be sent again although they are the same."""

    def __init__(self) -> None:
        self._base = ""
        self.base_hash = StreamHash()
        """Hash of the base that was sent last."""
        self._rounding = MergeRounding()

    @abstractmethod
    def load(self, weights: WeightPass, version: str, dtype: torch.dtype) -> None:
        """Load weights into the engine.

        Args:
            weights: makes a pass over them; call it any number of times, and read each pass to its
                end.
            version: label of the weights.
            dtype: dtype of the engine's weights.
        """

    @abstractmethod
    def load_adapter(self, weights: dict[str, Tensor], version: str) -> None:
        """Load an adapter into the engine, beside the weights that were loaded last.

        Args:
            weights: from `adapter_weights`.
            version: label of base and adapter together.
        """

    def send(
        self, stream: WeightStream, version: str, dtype: torch.dtype, supported: list[str] | None
    ) -> None:
        """Send all merged weights; or the adapter alone, after the base if that changed.

        Args:
            stream: reads the policy's weights.
            version: label of the policy's weights.
            dtype: dtype of the engine's weights.
            supported: last parts of the names of modules that the engine can adapt; None: LoRA is
                merged.

        Raises:
            ConfigurationError: if the engine does not support adapters of some adapted layers.
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
        """Forget which base the engine has, so that `send` sends it again."""
        self._base = ""
