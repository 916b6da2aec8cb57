"""Activation memory of layers that no formula describes, measured on narrow layers."""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from scsdpo.planning.architecture import Architecture
from scsdpo.policy import Lora
from scsdpo.policy.adapter import Adapter
from scsdpo.policy.budget import memory_line
from scsdpo.policy.decoder import decoder_of

_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "block_multiple_of",
)
_EXPERTS = ("num_experts", "num_local_experts")
_NARROWEST = 16
"""Largest divisor of widths."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured bytes for each token."""

    layers: tuple[float, ...] = ()
    """[L] bytes that each layer keeps for the backward; empty: nothing was measured."""
    end: float = 0.0
    """More bytes during the backward of a layer, or at the end of the decoder."""


def measured_layers(
    config: PreTrainedConfig,
    shapes: Architecture,
    adapter: Adapter,
    dtype: torch.dtype,
    *,
    autocast: bool,
) -> Measured:
    """Measure the bytes that a token takes in each layer, and beyond the layers.

    Bytes are proportional to the widths (hidden and feed-forward sizes, numbers of heads and of
    experts, rank), whatever the sizes of heads and chunks. So for each type of layer two models are
    built with random weights, of one and two layers, with all widths divided by the same number.
    They run on the CPU, forward and backward. The difference of their peaks, times that number, is
    one layer, and the rest is the end. It takes a second or two for each type.

    Args:
        config: the whole model's.
        shapes: the whole model's.
        adapter: the policy's.
        dtype: dtype of the loaded weights.
        autocast: True if products are in bf16.
    """
    text = config.get_text_config()
    settings = text.to_dict()
    by = math.gcd(_NARROWEST, *(settings[name] for name in _WIDTHS if settings.get(name)))
    if isinstance(adapter, Lora):
        by = math.gcd(by, adapter.r)
        adapter = replace(adapter, r=adapter.r // by)
    one, end = {}, 0.0
    for kind in dict.fromkeys(shapes.kinds):
        slopes = []
        for layers in (1, 2):
            narrow = copy.deepcopy(text)
            for name in _WIDTHS:
                if settings.get(name):
                    setattr(narrow, name, settings[name] // by)
            for name in _EXPERTS:
                most = settings.get(name) or 0
                if most // by >= 2 * (settings.get("num_experts_per_tok") or 1):
                    setattr(narrow, name, most // by)
            narrow.num_hidden_layers, narrow.vocab_size, narrow.pad_token_id = layers, 256, None
            if settings.get("layer_types"):
                narrow.layer_types = [kind] * layers
            slopes.append(_slope(narrow, adapter, dtype, autocast=autocast))
        one[kind] = (slopes[1] - slopes[0]) * by
        end = max(end, slopes[0] * by - one[kind])
    return Measured(layers=tuple(one[kind] for kind in shapes.kinds), end=end)


def _slope(
    config: PreTrainedConfig, adapter: Adapter, dtype: torch.dtype, *, autocast: bool
) -> float:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = adapter.language_model(adapter.wrap(plain))

    def run(tokens: int) -> Tensor:
        ids = torch.arange(tokens)[None] % 256
        made: Tensor = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        return made

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        return memory_line(run, model.get_input_embeddings(), torch.device("cpu"))[1]
