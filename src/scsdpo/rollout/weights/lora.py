"""How LoRA reaches an engine: merged into the weights, or alone beside a base that it has.

Alone it is 2 percent of the merged weights at rank 32, and its small updates are not lost to the
rounding of the weights that they are added to.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.lora import LoraLayer
from torch import Tensor

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.sharding import is_sharded
from scsdpo.rollout.weights.views import merged_layer

LoraTransport = Literal["auto", "merged", "alone"]
"""The argument `adapter` of an engine."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""


def why_not_alone(policy: CausalLM) -> str:
    """Why the policy's adapter cannot be brought by itself, naming the key; '' if it can."""
    adapter = policy.adapter
    if not isinstance(adapter, Lora):
        return "model.policy.adapter is no Lora, all weights are trained"
    if adapter.use_dora:
        return "vLLM does not know DoRA (model.policy.adapter.use_dora)"
    if adapter.r > RANKS[-1]:
        return f"vLLM knows ranks up to {RANKS[-1]} (model.policy.adapter.r is {adapter.r})"
    return ""


def rank_for(policy: CausalLM, adapter: LoraTransport) -> int | None:
    """`max_lora_rank` of an engine with room for the adapter; None if it is merged.

    Args:
        policy: whose adapter.
        adapter: the engine's argument.

    Raises:
        ConfigurationError: if it is to be `alone`, and cannot be.
    """
    why_not = why_not_alone(policy)
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
        layers = [m for m in policy.language_model.modules() if isinstance(m, LoraLayer)]
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
        merged, weight = merged_layer(layer).weight, layer.get_base_layer().weight
        changed += int((merged != weight).sum())
        kept += int((merged.to(dtype) != weight.to(dtype)).sum())
    return kept / changed if changed else None
