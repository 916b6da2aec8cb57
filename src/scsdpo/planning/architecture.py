"""The sizes of a model, from its `config.json` and without weights."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy import SHIPPED, Quantization, Unquantized
from scsdpo.policy.adapter import Adapter, adapted_layers
from scsdpo.policy.decoder import decoder_of
from scsdpo.policy.names import is_factor

_SHIPPED = Path(__file__).parent / "architectures.json"
"""Sizes of common models by hub name, so that they can be planned without the hub."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a decoder with layers of attention or states, feed-forwards and RMS norms.

    Counts are numbers of elements.
    """

    name: str
    """transformers' `model_type`, e.g. qwen3."""
    layers: int
    """L, number of decoder layers."""
    hidden: int
    """D, hidden size."""
    heads: int
    """H, query heads."""
    key_heads: int
    """K, heads of keys and values."""
    head_size: int
    """d, size of a head."""
    intermediate: int
    """I, width of the feed-forward."""
    vocabulary: int
    """V, rows of the head."""
    tied: bool
    """True if embedding and head are one table."""
    head_norms: bool
    """True if queries and keys are normalised."""
    kinds: tuple[str, ...]
    """[L] transformers' `layer_types`, e.g. full_attention."""
    windows: tuple[int | None, ...]
    """Tokens that each layer with attention sees; None: all."""
    state: int
    """Elements of a sequence's states in all layers of linear attention and convolution."""
    matrix_sizes: tuple[int, ...]
    """[L] elements in the linear layers of each decoder layer, with all experts."""
    active: int
    """Elements of these matrices, in all layers, that one token is multiplied with."""
    layer_sizes: tuple[int, ...]
    """[L] elements of each decoder layer, with norms and biases."""
    parameters: int
    """Elements of the model; tied weights count once."""

    @property
    def matrices(self) -> int:
        """Elements in the linear layers of the largest decoder layer."""
        return max(self.matrix_sizes)

    @property
    def layer(self) -> int:
        """Elements of the largest decoder layer."""
        return max(self.layer_sizes)

    @property
    def has_experts(self) -> bool:
        """True if a token is multiplied with only a part of the matrices."""
        return self.active < self.multiplied

    @property
    def is_plain(self) -> bool:
        """True if every layer is softmax attention and one gated feed-forward."""
        return not self.has_experts and set(self.kinds) <= _ATTENTION

    @property
    def queries(self) -> int:
        """H d."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K d."""
        return self.key_heads * self.head_size

    @property
    def table(self) -> int:
        """V D, the elements of the embedding; the head has equally many."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Elements outside of the decoder layers: embedding, head, last norm."""
        return self.parameters - sum(self.layer_sizes)

    @property
    def multiplied(self) -> int:
        """Elements of all layers' matrices, with all experts and without the head."""
        return sum(self.matrix_sizes)

    def cached(self, tokens: int) -> int:
        """Elements of the keys and values of a sequence of `tokens` tokens, in all layers."""
        places = sum(min(tokens, window or tokens) for window in self.windows)
        return 2 * self.keys * places

    @staticmethod
    def of(model: PreTrainedModel) -> "Architecture":
        """The sizes of a model without adapters, on any device, `meta` included.

        Raises:
            ConfigurationError: if plan does not support a type of layer, or the configuration
                lacks a size.
        """
        config = model.config.get_text_config()
        layers = decoder_of(model).layers
        settings = config.to_dict()
        needed = ("num_attention_heads", "intermediate_size", "hidden_size")
        missing = [name for name in needed if name not in settings]
        kinds = tuple(settings.get("layer_types") or ["full_attention"] * len(layers))
        unknown = sorted(set(kinds) - _ATTENTION - _STATES.keys())
        if missing or unknown:
            raise ConfigurationError(
                f"{config.model_type}: plan supports decoders with attention, linear attention and "
                f"convolutions, but this one has {'no ' + missing[0] if missing else unknown[0]}"
            )
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        matrices = [[p for p in each.parameters() if p.dim() > 1] for each in layers]
        # The only tensors of three dimensions are experts' stacked matrices and convolutions.
        share = _chosen(settings)
        active = sum(
            p.numel() * (share if p.dim() == 3 and p.shape[1] > 1 else 1)
            for each in matrices
            for p in each
        )
        head = model.get_output_embeddings().weight
        heads = config.num_attention_heads
        window = settings.get("sliding_window")
        return Architecture(
            name=config.model_type,
            layers=len(sizes),
            hidden=config.hidden_size,
            heads=heads,
            key_heads=settings.get("num_key_value_heads") or heads,
            head_size=settings.get("head_dim") or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocabulary=head.shape[0],
            tied=head is model.get_input_embeddings().weight,
            head_norms=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
            kinds=kinds,
            windows=tuple(
                window if kind == "sliding_attention" else None
                for kind in kinds
                if kind in _ATTENTION
            ),
            state=sum(_STATES[kind](settings) for kind in kinds if kind in _STATES),
            matrix_sizes=tuple(sum(p.numel() for p in each) for each in matrices),
            active=int(active),
            layer_sizes=tuple(sizes),
            parameters=sum(p.numel() for p in model.parameters()),
        )


def _chosen(settings: Mapping[str, Any]) -> float:
    """Share of the experts that a token goes through; 1 without experts."""
    every = settings.get("num_experts") or settings.get("num_local_experts")
    every = every or settings.get("n_routed_experts")
    return (settings.get("num_experts_per_tok") or 1) / every if every else 1.0


def _delta_rule(settings: Mapping[str, Any]) -> int:
    """Elements of a layer's state: a matrix (keys by values) for each head, and the last inputs of
    the convolution before it.
    """
    keys, values = settings["linear_key_head_dim"], settings["linear_value_head_dim"]
    heads = settings["linear_num_value_heads"]
    channels = 2 * settings["linear_num_key_heads"] * keys + heads * values
    return heads * keys * values + channels * (settings["linear_conv_kernel_dim"] - 1)


def _convolution(settings: Mapping[str, Any]) -> int:
    return settings["hidden_size"] * (settings["conv_L_cache"] - 1)


_ATTENTION = {"full_attention", "sliding_attention"}
_STATES = {"linear_attention": _delta_rule, "conv": _convolution}
"""Type of layer -> function of the elements of a sequence's state, which are float32."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Numbers of frozen and trained elements with an adapter."""

    frozen: int
    trained: int
    adapted: int
    """Frozen elements that have LoRA factors; sampling merges these into a copy."""
    rank_tables: int
    """Entries that factors keep for the backward, for each token and layer."""
    quantized: int = 0
    """Frozen elements that are kept in 4 bits."""
    packed: float = 0.0
    """Bytes of an element in 4 bits."""
    widest: int = 0
    """Elements of the largest matrix in 4 bits; one matrix at a time is dequantised."""

    @property
    def whole(self) -> bool:
        """True if all parameters are trained."""
        return self.frozen == 0

    @staticmethod
    def of(
        model: PreTrainedModel, adapter: Adapter, quantization: Quantization = Unquantized()
    ) -> "Counted":
        """Count the elements of `model`, on `meta`; this puts `adapter` on it."""
        layers = len(decoder_of(model).layers)
        matrices = matrices_in_4_bits(model, quantization)
        wrapped = adapter.wrap(model)
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        total = sum(p.numel() for p in wrapped.parameters())
        with_factors = [part for part in wrapped.modules() if isinstance(part, LoraLayer)]
        ranks = sum(sum(part.r.values()) for part in with_factors)
        beside = {
            id(p): p.numel()
            for part in adapted_layers(wrapped).values()
            for name, p in part.named_parameters()
            if not is_factor(f".{name}")
        }
        return Counted(
            frozen=total - trained,
            trained=trained,
            adapted=sum(beside.values()),
            rank_tables=ranks // layers,
            quantized=sum(matrices),
            packed=quantization.bytes_each(torch.float32) if matrices else 0.0,
            widest=max(matrices, default=0),
        )

    @staticmethod
    def all_linear(shapes: Architecture, rank: int) -> "Counted":
        """Count with factors of `rank` beside every linear layer but the head.

        A layer trains rank * (inputs + outputs) of q, k, v, o, gate, up and down.
        """
        sides = 7 * shapes.hidden + 2 * shapes.queries + 2 * shapes.keys + 3 * shapes.intermediate
        return Counted(
            frozen=shapes.parameters,
            trained=shapes.layers * rank * sides,
            adapted=shapes.multiplied,
            rank_tables=7 * rank,
        )


def matrices_in_4_bits(model: PreTrainedModel, quantization: Quantization) -> list[int]:
    """Elements of each matrix of `model` that would be in 4 bits: linear layers but the head."""
    if isinstance(quantization, Unquantized):
        return []
    head = model.get_output_embeddings()
    layers = (part for part in model.modules() if type(part) is nn.Linear and part is not head)
    return [layer.weight.numel() for layer in layers]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, on `meta`."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_model_config(
    name_or_path: str,
    architecture: str | None = None,
    *,
    key: str = "model.policy.name_or_path",
) -> PreTrainedConfig:
    """The configuration of a model, without asking the hub.

    Args:
        name_or_path: hub name or local folder of the model.
        architecture: a config.json, or a folder with one, to read instead.
        key: configuration key of the name, for error messages.

    Raises:
        ConfigurationError: if this machine does not have it; the message names the remedy.
    """
    name_or_path = str(SHIPPED.get(name_or_path, name_or_path))
    if architecture is not None:
        return _load("--architecture", architecture)
    if Path(name_or_path).exists():
        return _load(key, name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        shipped = shapes()
        if name_or_path in shipped:
            sizes = dict(shipped[name_or_path])
            return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        remedy = "give --architecture FILE, its config.json or the folder with it"
        if key != "model.policy.name_or_path":
            remedy = "name a folder with its config.json"
        raise ConfigurationError(
            f"{key}: {name_or_path} is not a folder, its config.json is not in the cache, and it "
            f"is not among the {len(shipped)} models whose sizes ship; `scsdpo plan` does not ask "
            f"the hub: {remedy}{hint}"
        ) from error


def shapes() -> Mapping[str, Mapping[str, Any]]:
    """Hub name -> the fields of its `config.json` that decide memory, for models that ship."""
    listed = json.loads(_SHIPPED.read_text(encoding="utf-8"))
    return {name: each["config"] for each in listed for name in each["names"]}


def _load(key: str, path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ConfigurationError(
            f"{key}: {path} has no config.json that transformers can read: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
